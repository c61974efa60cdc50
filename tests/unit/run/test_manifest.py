"""A folder is complete exactly when its manifest verifies."""

import json

import pytest

from megatron_vcppo.errors import UserError
from megatron_vcppo.run.manifest import MANIFEST_NAME, file_record, read_manifest, verify_manifest, write_manifest


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    (tmp_path / "weights").write_bytes(bytes(range(256)) * 40_000)  # more than one block
    (tmp_path / "empty").touch()
    write_manifest(tmp_path, {"iteration": 3})
    return tmp_path


def test_an_untouched_folder_verifies(folder):
    assert verify_manifest(folder) == {"iteration": 3}
    assert set(read_manifest(folder)["files"]) == {"hf/config.json", "weights", "empty"}
    assert sorted(path.name for path in folder.iterdir()) == ["empty", "hf", MANIFEST_NAME, "weights"]


def test_every_kind_of_damage_is_listed(folder):
    (folder / "hf" / "config.json").unlink()
    content = bytearray((folder / "weights").read_bytes())
    content[5_000_000] ^= 1
    (folder / "weights").write_bytes(content)
    (folder / "empty").write_text("x")
    with pytest.raises(UserError) as caught:
        verify_manifest(folder)
    message = str(caught.value)
    assert "hf/config.json: No such file" in message
    assert "weights: corrupt" in message
    assert "empty: 1 bytes, should be 0" in message


def test_without_checksums_only_sizes_are_looked_at(folder):
    (folder / "weights").write_bytes(bytes(256 * 40_000))
    verify_manifest(folder, checksums=False)
    with pytest.raises(UserError, match="weights: corrupt"):
        verify_manifest(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 99, "meta": {}, "files": {}}', '{"format": 1}'])
def test_a_damaged_manifest_is_no_manifest(folder, text):
    (folder / MANIFEST_NAME).write_text(text)
    with pytest.raises(UserError, match=MANIFEST_NAME):
        verify_manifest(folder)


def test_no_manifest_means_not_complete(tmp_path):
    with pytest.raises(UserError, match="not a complete checkpoint"):
        verify_manifest(tmp_path)


def test_records_that_are_known_are_not_read_again(folder):
    known = {"weights": file_record(folder / "weights")}
    (folder / "weights").write_bytes(b"changed since")
    write_manifest(folder, {}, known=known)
    assert json.loads((folder / MANIFEST_NAME).read_text())["files"]["weights"] == known["weights"]
    with pytest.raises(UserError, match="weights"):
        verify_manifest(folder)
