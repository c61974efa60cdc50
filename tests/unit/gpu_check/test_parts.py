"""The parts of tools/gpu_check.sh run on a CPU, in tiny sizes, so that on a GPU nothing fails of a typo; and each one
sees an error where there is one."""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.distributed import run_distributed_test
from tools.benchmarks import train as train_benchmark
from tools.benchmarks._train_sides import Work, planned_gib
from tools.gpu_check import __main__ as runner
from tools.gpu_check import card, checkpoints, engine, kernels, marked, parity, training
from tools.gpu_check.child import call
from tools.gpu_check.parts import PARTS
from tools.gpu_check.rows import Row
from tools.gpu_check.tiny import write_model

ROOT = Path(__file__).parents[3]


def verdicts(rows: list[Row]) -> list[str]:
    return [row.verdict for row in rows]


def test_parity_of_all_families_and_a_wrong_number_is_seen(tmp_path: Path) -> None:
    folders = {family: write_model(tmp_path / family, family, "tiny") for family in parity.FAMILIES}
    (found,) = run_distributed_test(parity.collect, 1, folders, ("float32", "bfloat16"), "tiny")
    rows = parity.compare("own", found, found)
    assert len(rows) == 2 * 5 and set(verdicts(rows)) == {"ok"}
    assert float(rows[-1].result) > 1e-4  # bf16 is not float32
    wrong = {d: {f: {o: t.clone() for o, t in out.items()} for f, out in fam.items()} for d, fam in found.items()}
    wrong["float32"]["qwen3"]["values"] *= 1.001
    wrong["bfloat16"]["llama"]["gradients actor"][0] = float("nan")
    failed = [row.what for row in parity.compare("own", wrong, found) if row.verdict == "FAIL"]
    assert failed == ["own layers, float32, values (qwen3)", "own layers, bfloat16, gradients actor (llama)"]


def test_checkpoints_resume_and_a_difference_is_seen(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"model": write_model(tmp_path / "model", "qwen3", "tiny"), "size": "tiny"}
    (written,) = run_distributed_test(checkpoints.write, 1, folder=tmp_path / "saved", **arguments)
    folders = {"here": tmp_path / "saved", "nowhere": tmp_path / "nothing"}
    (resumed,) = run_distributed_test(checkpoints.read, 1, folders=folders, **arguments)
    for kind in checkpoints.OPTIMIZERS:
        row = checkpoints.row("x", resumed["here", kind], written[kind], same=True)
        assert row.verdict == "ok" and row.result == "0"
        lost = checkpoints.row("x", resumed["nowhere", kind], written[kind], same=True)
        assert lost.verdict == "FAIL" and "nothing to resume" in lost.result
    shifted = {name: [1.1 * value for value in values] for name, values in written["plain optimizer"].items()}
    assert checkpoints.row("x", shifted, written["plain optimizer"], same=False).verdict == "FAIL"


def test_kernels_and_card() -> None:
    (rows,) = run_distributed_test(kernels.run, 1, "cpu", "tiny")
    by_name = {row.what: row for row in rows}
    assert [row.verdict for what, row in by_name.items() if "largest error" in what] == ["ok", "ok"]
    assert len(rows) == 5
    assert [row.what for row in card.run("cpu", "tiny")][-2:] == ["bf16 matrix product", "copy, read and written"]


@pytest.mark.parametrize(
    "absent", [["transformers", "tokenizers", "zstandard", "numba", "datasets", "wandb", "aiohttp"]]
)
def test_the_trainer_s_parts_need_what_they_name(absent: list[str]) -> None:
    """Where nothing else is installed, as on a machine that got the wheels, the modules import."""
    modules = ["parity", "checkpoints", "tiny", "kernels", "training"]
    script = f"import sys\nsys.modules.update(dict.fromkeys({absent}))\n"
    script += "".join(f"import tools.gpu_check.{name}\n" for name in modules)
    script += (
        "import megatron_vcppo.mcore.checkpoint, megatron_vcppo.mcore.learner, megatron_vcppo.stages.training_losses\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=200, cwd=ROOT)


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    train_benchmark.add_arguments(parser)
    return parser.parse_args([*training.SIZES["full"].split(), *arguments])


def test_the_plan_of_the_training_part() -> None:
    """The model has one to two billion parameters, its micro-batches 16K tokens, and an H100 holds it."""
    from megatron_vcppo.hf.architecture import Architecture

    args = options("--dtype", "bfloat16")
    arch = Architecture.from_config({"model_type": "qwen2", **train_benchmark._sizes(args)})
    assert 1e9 < arch.parameter_count() < 2e9 and args.tokens_per_microbatch == 16384
    sequences = train_benchmark._sequences(args, arch.vocab_size)
    assert {len(ids) for ids in sequences} == {4096} and len(sequences) == 16
    work = Work(None, arch, sequences, {"dtype": "bfloat16"}, 1, {"tp": 1, "pp": 1, "cp": 1, "dp": 1}, 16384, "none",
                False, 1e-5, 8)  # fmt: skip
    assert 40 < planned_gib(work) < 74


@pytest.mark.parametrize(("name", "tflops"), [
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA GH200 480GB", 989), ("NVIDIA L4", 121),
    ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA L40S", 362), ("NVIDIA A10G", 70), ("NVIDIA A10", 125),
    ("NVIDIA GB200", 2250), ("NVIDIA H200 NVL", 835),
])  # fmt: skip
def test_peaks_go_by_the_card_s_name(name: str, tflops: int) -> None:
    found = train_benchmark.peak_tflops(name)
    assert found == tflops
    assert train_benchmark.peak_tflops("NVIDIA Unheard Of") is None


CASE: dict[str, Any] = {
    "parameters": 1.3e9, "tokens_per_s": 50000, "mfu": 0.45, "peak_memory_gib": 60.0, "planned_memory_gib": 58.0,
    "device": "a card", "losses": [10.0, 9.0],
}  # fmt: skip


def _bench_or_break(cases: dict[str, Any], options: tuple[str, ...]) -> dict[str, Any]:
    if "--own-layers" in options:
        raise RuntimeError("rank 0 of megatron ended")
    return cases["te"]


def test_training_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {"own": CASE, "te": CASE | {"mfu": 0.39, "peak_memory_gib": 70.0}}
    monkeypatch.setattr(training, "te_installed", lambda target: True)
    monkeypatch.setattr(training, "bench", lambda text, *options: cases["own" if "--own-layers" in options else "te"])
    rows = training.run("cuda", "full")
    assert verdicts(rows) == ["ok", "ok", "FAIL", "FAIL"]
    assert rows[2].goal == "≥ 0.4" and rows[3].result == "0.207"
    cases["te"] = CASE | {"mfu": None}
    assert verdicts(training.run("cuda", "full"))[2] == "skipped: no peak known for a card: tools/benchmarks/train.py"
    del cases["own"]
    monkeypatch.setattr(training, "bench", lambda text, *options: _bench_or_break(cases, options))
    assert verdicts(training.run("cuda", "full"))[0] == "FAIL"
    assert len(training.run("cuda", "full")) == 3, "what breaks with one kind of layers leaves the other its rows"
    monkeypatch.setattr(training, "te_installed", lambda target: False)
    assert verdicts(training.run("cuda", "full"))[-1].startswith("skipped: Transformer Engine")


def test_fp8_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def bench(text: str, *options: str) -> dict[str, Any]:
        if "blockwise" in text:
            raise RuntimeError("no kernel")
        return CASE | ({"losses": [10.0, 9.5]} if "current" in text else {})

    monkeypatch.setattr(training, "bench", bench)
    monkeypatch.setattr(training, "no_fp8", lambda target: "no reason")
    assert verdicts(training.run_fp8("cuda", "full")) == ["skipped: no reason"]
    monkeypatch.setattr(training, "no_fp8", lambda target: "")
    assert verdicts(training.run_fp8("cuda", "full")) == ["ok", "ok", "FAIL", "ok", "FAIL"]
    by_heart = training.fp8_rows("delayed", CASE | {"losses": [10.0, 0.002]}, CASE | {"losses": [10.0, 0.001]})
    assert verdicts(by_heart) == ["ok", "ok"], "a ratio of losses near zero says nothing"


def test_fp8_needs_the_layers_and_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Transformer Engine" in training.no_fp8("cpu")
    monkeypatch.setattr(training, "te_installed", lambda target: True)
    for capability, found in (((8, 0), "compute capability 8.0 has no FP8"), ((9, 0), "")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        assert training.no_fp8("cuda").startswith(found) and bool(training.no_fp8("cuda")) == bool(found)


def test_sleep_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 1 << 30
    free = {"before": 70 * gib, "awake": 50 * gib, "level 1": 68 * gib, "level 2": 60 * gib}
    monkeypatch.setattr(engine, "vllm_cycle", lambda model: ([[1, 2], [1, 2]], free))
    assert verdicts(engine.asleep(Path())) == ["ok", "FAIL", "ok"]
    monkeypatch.setattr(engine, "vllm_cycle", lambda model: ([[1, 2], [1, 3]], free))
    assert verdicts(engine.asleep(Path())) == ["ok", "FAIL", "FAIL"]


@pytest.mark.slow
def test_marked_tests_run_and_are_skipped_without_a_gpu() -> None:
    rows = call("tools.gpu_check.marked:run", 200.0, device="cpu", target="cpu", size="tiny")
    assert rows and all(row.verdict.startswith("skipped: ") for row in rows)
    assert not any(marked.SELF in row.what for row in rows)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_check_on_a_cpu(capsys) -> None:
    """All parts but the engine, which has a test of its own, as children: none breaks, whatever its verdicts."""
    names = [part.name for part in PARTS if part.name != "engine"]
    assert runner.main([*names, "--device", "cpu", "--size", "tiny"]) in (0, 1)
    printed = capsys.readouterr().out
    assert "ends without an error" not in printed
    assert ("MFU" in printed and "skipped: this version has no key" in printed) or "skipped: Transformer" in printed


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_engine_part_on_a_cpu(tmp_path: Path) -> None:
    rows = engine.run("cpu", "tiny")
    assert verdicts(rows) == ["ok", "ok", "skipped: vLLM on a CPU has neither"]
