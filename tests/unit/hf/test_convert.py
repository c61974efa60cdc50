"""Import and export in one process: bit-equal round trips, and every kind of bad input leaves nothing behind."""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_vcppo import cli
from megatron_vcppo.errors import UserError
from megatron_vcppo.hf.convert import copying
from megatron_vcppo.hf.convert.exporter import check_export, export_hf
from megatron_vcppo.hf.convert.importer import import_hf
from megatron_vcppo.run.manifest import read_manifest, write_manifest
from tools.benchmarks._tiny_models import FAMILIES, save_tiny_model

WEIGHTS = "model.safetensors"


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_bit_equal(first: Path, second: Path) -> None:
    ours, theirs = load_weights(first), load_weights(second)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)), name


def rewrite(folder: Path, change) -> None:
    """Apply ``change`` to the dict of a folder's tensors."""
    tensors = load_weights(folder)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.fixture
def hf(tmp_path) -> Path:
    return save_tiny_model(tmp_path / "hf")


@pytest.fixture
def checkpoint(tmp_path, hf) -> Path:
    import_hf(hf, tmp_path / "checkpoint", 2, 2)
    return tmp_path / "checkpoint"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
def test_round_trip_is_bit_equal(tmp_path, monkeypatch, family, tied, tp, pp):
    monkeypatch.setattr(copying, "BUCKET_BYTES", 1000)  # a few rows: every tensor takes several buckets
    hf = save_tiny_model(tmp_path / "hf", family, tied)
    import_hf(hf, tmp_path / "checkpoint", tp, pp)
    files = list((tmp_path / "checkpoint").glob("*.distcp"))
    assert len(files) == tp * pp
    export_hf(tmp_path / "checkpoint", tmp_path / "out", verify_logits=False)
    assert_bit_equal(hf, tmp_path / "out")


def test_unusual_bit_patterns_survive(tmp_path, hf):
    def change(tensors):
        pattern = torch.tensor([0x7FC1, 0xFFFF, 0x8000, 0x0001], dtype=torch.int32).to(torch.int16)
        for name, tensor in tensors.items():
            tensors[name] = tensor.to(torch.bfloat16)
        tensors["model.norm.weight"][:4] = pattern.view(torch.bfloat16)  # NaNs with payloads, -0, a subnormal

    rewrite(hf, change)
    import_hf(hf, tmp_path / "checkpoint", 2, 1)
    export_hf(tmp_path / "checkpoint", tmp_path / "out", verify_logits=False)
    assert_bit_equal(hf, tmp_path / "out")


def test_sharded_files_in_and_out(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_vcppo.hf.convert.exporter.MAX_FILE_BYTES", 80_000)
    whole = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / "whole", "llama"))
    whole.save_pretrained(tmp_path / "hf", max_shard_size="100KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    import_hf(tmp_path / "hf", tmp_path / "checkpoint", 2, 2)
    export_hf(tmp_path / "checkpoint", tmp_path / "out", verify_logits=False)
    assert_bit_equal(tmp_path / "hf", tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    weights = load_weights(tmp_path / "out")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights.values())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "out" / file)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(*pair) for pair in zip(whole.parameters(), again.parameters(), strict=True))


def test_small_files_travel_and_weights_do_not(tmp_path, hf):
    texts = {
        "tokenizer.json": "{}",
        "tokenizer_config.json": '{"a": 1}',
        "generation_config.json": "{}",
        "chat_template.jinja": "{{ messages }}",
        "merges.txt": "a b",
    }
    for name, text in texts.items():
        (hf / name).write_text(text)
    (hf / "additional_chat_templates").mkdir()
    (hf / "additional_chat_templates" / "tool.jinja").write_text("tool")
    (hf / "pytorch_model.bin").write_text("old weights")
    import_hf(hf, tmp_path / "checkpoint", 1, 1)
    shutil.rmtree(hf)
    export_hf(tmp_path / "checkpoint", tmp_path / "out", verify_logits=False)
    for name, text in texts.items():
        assert (tmp_path / "out" / name).read_text() == text
    assert (tmp_path / "out" / "additional_chat_templates" / "tool.jinja").read_text() == "tool"
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_export_converts_dtypes_and_says_so_in_the_config(tmp_path, checkpoint, hf, dtype):
    export_hf(checkpoint, tmp_path / "out", dtype, verify_logits=False)
    before, after = load_weights(hf), load_weights(tmp_path / "out")
    assert all(torch.equal(after[name], before[name].to(dtype)) for name in before)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")


def test_a_weight_too_large_for_float16_is_not_made_infinite(tmp_path, hf):
    rewrite(hf, lambda tensors: tensors["model.norm.weight"][:1].fill_(1e6))
    import_hf(hf, tmp_path / "checkpoint", 1, 1)
    with pytest.raises(UserError, match="too large for float16"):
        export_hf(tmp_path / "checkpoint", tmp_path / "out", torch.float16, verify_logits=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "hf"]


def cut(file: Path, missing_bytes: int = 10) -> None:
    with open(file, "r+b") as stream:
        stream.truncate(file.stat().st_size - missing_bytes)


def with_header(header: str) -> bytes:
    return struct.pack("<Q", len(header)) + header.encode()


def break_shape(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(95, 64)


def break_dtype(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(96, 64, dtype=torch.int32)


BAD_IMPORTS = {
    "truncated": (lambda hf: cut(hf / WEIGHTS), r"model\.safetensors: truncated or damaged: \d+ bytes, should be \d+"),
    "cut in the header": (lambda hf: (hf / WEIGHTS).write_bytes(struct.pack("<Q", 10**6) + b"{"), "truncated, or not"),
    "a header of something else": (lambda hf: (hf / WEIGHTS).write_bytes(with_header('{"a": 1}')), "damaged header"),
    "a header that is a list": (lambda hf: (hf / WEIGHTS).write_bytes(with_header("[]")), "damaged header"),
    "a tensor of the index": (
        lambda hf: (hf / "model.safetensors.index.json").write_text(f'{{"weight_map": {{"a": "{WEIGHTS}"}}}}'),
        r"tensor a is not in model\.safetensors",
    ),
    "missing": (
        lambda hf: rewrite(hf, lambda t: (t.pop("model.norm.weight"), t.pop("model.layers.2.mlp.gate_proj.weight"))),
        r"missing: model\.layers\.2\.mlp\.gate_proj\.weight \[96, 64\]\n  missing: model\.norm\.weight",
    ),
    "extra": (lambda hf: rewrite(hf, lambda t: t.update(what=torch.zeros(2))), "unexpected: what"),
    "misshaped": (
        lambda hf: rewrite(hf, break_shape),
        r"misshaped: model\.layers\.1\.mlp\.up_proj\.weight is \[95, 64\], should be \[96, 64\]",
    ),
    "integers": (lambda hf: rewrite(hf, break_dtype), "dtype I32"),
    "mixed dtypes": (
        lambda hf: rewrite(hf, lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(96, 64).half()})),
        "different dtypes:\n.*up_proj",
    ),
    "no weights": (lambda hf: (hf / WEIGHTS).unlink(), r"no \*\.safetensors"),
    "a file of the index": (
        lambda hf: (hf / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}'),
        r"gone\.safetensors: No such file",
    ),
    "an index out of the folder": (
        lambda hf: (hf / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}'),
        "must name files of this folder",
    ),
}


@pytest.mark.parametrize("case", BAD_IMPORTS)
def test_bad_weights_are_listed_and_nothing_is_left(tmp_path, hf, case):
    spoil, message = BAD_IMPORTS[case]
    spoil(hf)
    with pytest.raises(UserError, match=message):
        import_hf(hf, tmp_path / "checkpoint", 2, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_tied_models_spare_output_layer_must_agree(tmp_path):
    hf = save_tiny_model(tmp_path / "hf", tied=True)
    rewrite(hf, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    import_hf(hf, tmp_path / "same", 1, 1)
    rewrite(hf, lambda t: t["lm_head.weight"][0].add_(1))
    with pytest.raises(UserError, match="ties the output layer"):
        import_hf(hf, tmp_path / "other", 1, 1)


def test_output_folders_in_use_are_refused(tmp_path, hf, checkpoint):
    for convert in (lambda: import_hf(hf, checkpoint, 1, 1), lambda: export_hf(checkpoint, hf, verify_logits=False)):
        with pytest.raises(UserError, match="exists already"):
            convert()
    (tmp_path / "empty").mkdir()
    export_hf(checkpoint, tmp_path / "empty", verify_logits=False)
    assert_bit_equal(hf, tmp_path / "empty")


def remanifest(checkpoint: Path, change) -> None:
    """Change a checkpoint's meta and make it verify again."""
    meta = read_manifest(checkpoint)["meta"]
    change(meta)
    write_manifest(checkpoint, meta)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)


def claim_five_layers(checkpoint: Path) -> None:
    config = checkpoint / "hf" / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 4', '"num_hidden_layers": 5'))
    remanifest(checkpoint, lambda meta: meta["architecture"].update(num_layers=5))


BAD_CHECKPOINTS = {
    "flipped": (lambda path: flip(path / "__3_0.distcp"), r"__3_0\.distcp: corrupt"),
    "truncated": (lambda path: cut(path / "__0_0.distcp"), r"__0_0\.distcp: \d+ bytes, should be"),
    "missing": (lambda path: (path / "__1_0.distcp").unlink(), r"__1_0\.distcp: No such file"),
    "never finished": (lambda path: (path / "manifest.json").unlink(), "no manifest.json"),
    "no kind": (lambda path: remanifest(path, lambda meta: meta.pop("kind")), "holds no actor; it has nothing"),
    "another kind": (lambda path: remanifest(path, lambda meta: meta.update(kind="router")), "holds 'router'"),
    "no value head": (
        lambda path: remanifest(path, lambda meta: meta.update(kind="critic")),
        r"missing: value_head\.weight",
    ),
    "more layers": (
        claim_five_layers,
        r"misshaped: decoder\.layers\.mlp\.linear_fc1\.weight is \[4, 192, 64\], should be \[5, 192, 64\]",
    ),
    "another config": (
        lambda path: remanifest(path, lambda meta: meta["architecture"].update(rope_theta=1.0)),
        "another model",
    ),
}


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_a_bad_checkpoint_is_not_exported(tmp_path, checkpoint, case):
    spoil, message = BAD_CHECKPOINTS[case]
    spoil(checkpoint)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(UserError, match=message):
        export_hf(checkpoint, tmp_path / "out", verify_logits=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_the_check_of_an_export_sees_every_difference(tmp_path, checkpoint):
    export_hf(checkpoint, tmp_path / "out", verify_logits=False)
    expected = {name: (tuple(t.shape), t.dtype) for name, t in load_weights(tmp_path / "out").items()}
    check_export(tmp_path / "out", expected)
    with pytest.raises(UserError, match=r"unexpected: model\.norm\.weight"):
        check_export(tmp_path / "out", {name: kind for name, kind in expected.items() if name != "model.norm.weight"})
    with pytest.raises(UserError, match=r"model\.norm\.weight: torch\.float32, should be torch\.bfloat16"):
        check_export(tmp_path / "out", expected | {"model.norm.weight": ((64,), torch.bfloat16)})


def test_commands_convert_and_answer_mistakes_with_one_line(tmp_path, hf, capsys):
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "out"
    arguments = ["--hf", str(hf), "--out", str(checkpoint), "--tp", "2", "--pp", "2"]
    assert cli.main(["convert", "import", *arguments]) == 0
    assert cli.main(["convert", "export", "--checkpoint", str(checkpoint), "--out", str(out), "--no-verify"]) == 0
    assert_bit_equal(hf, out)
    capsys.readouterr()
    assert cli.main(["convert", "import", *arguments]) == cli.USER_ERROR
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"vcppo: error: {checkpoint}: exists already; choose another folder or remove it"
    assert cli.main(["convert", "export", "--checkpoint", str(hf), "--out", str(tmp_path / "x")]) == 2
    assert capsys.readouterr().err == f"vcppo: error: {hf}: not a complete checkpoint: no manifest.json\n"


def test_gather_and_scatter_agree_with_numpy(tmp_path):
    """Column strips of an odd width, several buckets, several threads."""
    wide = np.random.default_rng(0).integers(0, 256, (500, 70), dtype=np.uint8)
    (tmp_path / "wide").write_bytes(wide.tobytes())
    for name, width in (("left", 33), ("right", 37)):
        copying.allocate(tmp_path / name, 500 * width)
    strips = (
        copying.Strip(copying.Matrix(tmp_path / "left", 0, 33), 0, 0),
        copying.Strip(copying.Matrix(tmp_path / "right", 0, 37), 0, 33),
    )
    seen = []
    job = copying.Job(copying.Matrix(tmp_path / "wide", 0, 70), 0, 500, strips)
    copying.scatter([job], wide.nbytes, lambda done, total: seen.append((done, total)))
    assert (tmp_path / "left").read_bytes() == wide[:, :33].tobytes()
    assert (tmp_path / "right").read_bytes() == wide[:, 33:].tobytes()
    assert seen[-1] == (wide.nbytes, wide.nbytes)
    copying.allocate(tmp_path / "again", wide.nbytes)
    back = copying.Job(copying.Matrix(tmp_path / "again", 0, 70), 0, 500, strips)
    copying.gather([back], wide.nbytes)
    assert (tmp_path / "again").read_bytes() == wide.tobytes()
