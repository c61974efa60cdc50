"""Crafted checkpoint folders: nothing of them is executed, nothing outside of them is read, and each costs one line."""

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, BytesStorageMetadata, Metadata, MetadataIndex

from megatron_vcppo.cli import main
from megatron_vcppo.errors import UserError
from megatron_vcppo.hf.convert.checkpoint_metadata import METADATA_NAME, check_checkpoint, read_metadata
from megatron_vcppo.hf.convert.folders import copy_small_files, small_files
from megatron_vcppo.hf.convert.importer import import_hf
from megatron_vcppo.run.folder import StageFolder
from megatron_vcppo.run.manifest import MANIFEST_NAME, read_manifest, verify_manifest, write_manifest
from tools.benchmarks._tiny_models import save_tiny_model

WEIGHT = "embedding.word_embeddings.weight"


class Runs:
    """Unpickled by anything that executes pickles, this makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.file),)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    import_hf(save_tiny_model(folder / "hf"), folder / "checkpoint", 1, 1)
    return folder / "checkpoint"


@pytest.fixture
def checkpoint(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "checkpoint"))


def change(checkpoint: Path, edit: Callable[[Metadata], Any]) -> None:
    """Edit .metadata, and let the manifest verify again."""
    metadata = read_metadata(checkpoint)
    edited = edit(metadata)
    with open(checkpoint / METADATA_NAME, "wb") as stream:
        pickle.dump(edited or metadata, stream)
    write_manifest(checkpoint, read_manifest(checkpoint)["meta"])


def move_chunk(name: str, offset: int = 0) -> Callable[[Metadata], None]:
    def edit(metadata: Metadata) -> None:
        index = next(index for index in metadata.storage_data if index.fqn == WEIGHT)
        metadata.storage_data[index] = _StorageInfo(name, offset, 100)

    return edit


def as_object(metadata: Metadata) -> None:
    """What would be a tensor is an object, which Megatron's loader unpickles."""
    metadata.state_dict_metadata[WEIGHT] = BytesStorageMetadata()
    metadata.storage_data[MetadataIndex(WEIGHT)] = _StorageInfo("__0_0.distcp", 0, 100)


def forget_chunks(metadata: Metadata) -> None:
    metadata.storage_data.clear()


BAD_METADATA = {
    "a chunk above the folder": (move_chunk("../secret"), "is in '../secret', which is no file of the folder"),
    "a chunk anywhere": (move_chunk("/etc/passwd"), "is in '/etc/passwd'"),
    "a chunk before the file": (move_chunk("__0_0.distcp", -5), "is at"),
    "chunks nowhere": (forget_chunks, "chunks of .* are nowhere"),
    "an object for a tensor": (as_object, f"{WEIGHT} is no tensor but an object, which could run code"),
    "a dictionary": (lambda metadata: {"tensors": 3}, "it is no metadata"),
    "numbers for sizes": (
        lambda metadata: setattr(metadata.state_dict_metadata[WEIGHT], "size", 3),
        "it has no dtype or no size",
    ),
    "no fields": (
        lambda metadata: vars(metadata.state_dict_metadata[WEIGHT]).pop("properties") and None,
        "damaged checkpoint metadata: AttributeError",
    ),
}


def export(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which the export refuses a folder."""
    out = checkpoint.parent / "out"
    assert main(["convert", "export", "--checkpoint", str(checkpoint), "--out", str(out), "--no-verify"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and not out.exists(), lines
    return lines[0]


@pytest.mark.parametrize("case", BAD_METADATA)
def test_bad_metadata_costs_one_line(checkpoint: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    edit, message = BAD_METADATA[case]
    change(checkpoint, edit)
    line = export(checkpoint, capsys)
    assert re.search(message, line), line


@pytest.mark.parametrize("file", [METADATA_NAME, "common.pt"])
def test_a_pickle_that_runs_code_is_not_executed(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, file: str
) -> None:
    made = tmp_path / "made by the checkpoint"
    with open(checkpoint / file, "wb") as stream:
        torch.save(Runs(made), stream) if file == "common.pt" else pickle.dump(Runs(made), stream)
    write_manifest(checkpoint, read_manifest(checkpoint)["meta"])
    assert checkpoint.name in export(checkpoint, capsys)
    with pytest.raises(UserError):
        check_checkpoint(checkpoint)
    assert not made.exists()
    with open(checkpoint / file, "rb") as stream:  # that it would run, were it loaded as it used to be
        torch.load(stream, weights_only=False) if file == "common.pt" else pickle.load(stream)
    assert made.exists()


LIVE = {
    "a class": b"cpathlib\nPurePosixPath\n",
    "an instance of no dataclass": b"cpathlib\nPurePosixPath\n)R",
    "a dataclass": b"ctorch.distributed.checkpoint.metadata\nMetadata\n",
    "a function": b"ctorch.serialization\n_get_layout\n",
    "a member": b"ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\n(I0\ntR",
}


@pytest.mark.parametrize("what", LIVE)
def test_metadata_changes_nothing_in_the_process(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    ordinary = (checkpoint / METADATA_NAME).read_bytes()
    change_it = LIVE[what] + b"(N(dX\x06\x00\x00\x00markedI1\nstb0"  # BUILD with (None, {"marked": 1}), POP
    (checkpoint / METADATA_NAME).write_bytes(change_it + ordinary)
    write_manifest(checkpoint, read_manifest(checkpoint)["meta"])
    assert "damaged checkpoint metadata: UnpicklingError: it sets attributes of" in export(checkpoint, capsys)
    live = [PurePosixPath, Metadata, torch.serialization._get_layout, _MEM_FORMAT_ENCODING(0)]
    assert not any(hasattr(thing, "marked") for thing in live)


def test_enumerations_may_be_written_as_python_3_11_2_does(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian 12's Python writes getattr of the class and the member's name."""
    before = read_metadata(checkpoint)
    monkeypatch.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", lambda self, _: (getattr, (type(self), self.name)))
    change(checkpoint, lambda metadata: None)
    assert b"getattr" in (checkpoint / ".metadata").read_bytes()
    assert read_metadata(checkpoint).state_dict_metadata == before.state_dict_metadata


def test_a_model_names_no_file_of_the_user(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny_model(tmp_path / "hf")
    capsys.readouterr()
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key.jinja").write_text("secret")
    out = tmp_path / "checkpoint"
    for name, target in {"NOTES.md": "key.jinja", "additional_chat_templates": ""}.items():
        (model / name).symlink_to(tmp_path / "secret" / target)
        assert main(["convert", "import", "--hf", str(model), "--out", str(out)]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and name in lines[0] and "a symbolic link that leads out of" in lines[0], lines
        assert not out.exists()
        (model / name).unlink()


def test_a_snapshot_of_the_cache_takes_blobs_of_its_model_only(tmp_path: Path) -> None:
    cached = tmp_path / "models--of--it"
    snapshot = cached / "snapshots" / "0123"
    (cached / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (cached / "blobs" / "abc").write_text("from a blob")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/abc")
    copy_small_files(snapshot, tmp_path / "copy")
    assert (tmp_path / "copy" / "tokenizer.json").read_text() == "from a blob"
    (tmp_path / "secret").write_text("secret")
    (cached / "blobs" / "def").symlink_to(tmp_path / "secret")
    for target in ("../../blobs/def", "../../../secret"):
        (snapshot / "NOTES.md").symlink_to(target)
        with pytest.raises(UserError, match=r"NOTES.md: a symbolic link that leads out of"):
            small_files(snapshot)
        (snapshot / "NOTES.md").unlink()


@pytest.mark.parametrize("size", [0, 100])
def test_a_truncated_common_file_is_named(checkpoint: Path, capsys: pytest.CaptureFixture[str], size: int) -> None:
    content = (checkpoint / "common.pt").read_bytes()
    (checkpoint / "common.pt").write_bytes(content[:size])
    write_manifest(checkpoint, read_manifest(checkpoint)["meta"])
    assert "common.pt: cannot be read" in export(checkpoint, capsys)


@pytest.mark.parametrize("where", ["hf/secret.json", "extra", "hf/additional_chat_templates"])
def test_links_out_of_a_checkpoint_are_not_followed(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, where: str
) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key.json").write_text('{"key": 1}')
    target = tmp_path / "secret" / ("key.json" if where.endswith(".json") else "")
    (checkpoint / where).symlink_to(target)
    assert "a symbolic link that leads out of" in export(checkpoint, capsys)


def test_links_inside_of_a_checkpoint_are_fine(checkpoint: Path) -> None:
    (checkpoint / "hf" / "same.json").symlink_to("config.json")
    check_checkpoint(checkpoint)


BAD_MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "files are a list": (lambda m: m.update(files=[]), "not a manifest of format 1"),
    "a name above": (lambda m: m["files"].update({"../x": {"size": 1, "xxh3": ""}}), "'../x' is no name inside"),
    "an absolute name": (lambda m: m["files"].update({"/etc/passwd": {"size": 1, "xxh3": ""}}), "is no name inside"),
    "a record that is a number": (lambda m: m["files"].update({"common.pt": 3}), "the record of 'common.pt'"),
    "a record without a size": (lambda m: m["files"].update({"common.pt": {"xxh3": ""}}), "the record of 'common.pt'"),
    "an architecture that is a list": (lambda m: m["meta"].update(architecture=[1]), "damaged manifest: architecture"),
    "no architecture": (lambda m: m["meta"].pop("architecture"), "damaged manifest: architecture"),
    "layers as text": (lambda m: m["meta"]["architecture"].update(num_layers="2"), "num_layers '2' is no int"),
    "endless layers": (lambda m: m["meta"]["architecture"].update(num_layers=10**9), "num_layers 1000000000"),
    "ranks as text": (lambda m: m["meta"].update(tp="2"), "tp '2' is no number of ranks"),
    "nested": (lambda m: m.update(files="[" * 100_000), "not a manifest"),
}


@pytest.mark.parametrize("case", BAD_MANIFESTS)
def test_bad_manifests_cost_one_line(checkpoint: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    edit, message = BAD_MANIFESTS[case]
    content = read_manifest(checkpoint)
    edit(content)
    text = json.dumps(content).replace('"' + "[" * 100_000 + '"', "[" * 100_000)
    (checkpoint / MANIFEST_NAME).write_text(text)
    line = export(checkpoint, capsys)
    assert message in line or "nested too deeply" in line, line


def test_a_stage_names_a_checkpoint_of_its_own(tmp_path: Path) -> None:
    stage = StageFolder(tmp_path / "sft").make()
    (tmp_path / "other").mkdir()
    write_manifest(stage.path, {"checkpoint": None})
    assert stage.last_checkpoint("actor") is None
    for name in ("../other", "/etc", 3, ""):
        write_manifest(stage.path, {"checkpoint": name})
        verify_manifest(stage.path)
        with pytest.raises(UserError, match="is no name inside of the folder"):
            stage.last_checkpoint("actor")
