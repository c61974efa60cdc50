"""Checkpoints: resharding continues with the same losses, damage is found, the last good one is taken."""

import io
import json
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForTokenClassification

from megatron_vcppo.config import CheckpointConfig, Config, KeepBestConfig, ModelConfig, ParallelConfig
from megatron_vcppo.data.packing import pack_all, unpack_all
from megatron_vcppo.errors import UserError
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.hf.convert.exporter import export_hf
from megatron_vcppo.mcore import checkpoint as checkpoint_module
from megatron_vcppo.mcore import checkpoint_writer, runtime
from megatron_vcppo.mcore.checkpoint import CheckpointFolder, complete_checkpoints, load_model
from megatron_vcppo.mcore.model import build_actor, build_critic
from megatron_vcppo.run.manifest import verify_manifest
from tests.helpers.checkpoints import checkpoint_folder
from tests.helpers.distributed import RanksFailed, run_distributed_test
from tests.helpers.training import make_sequences, start, train
from tools.benchmarks._tiny_models import save_tiny_model

TP2PP2 = ParallelConfig(tp=2, pp=2, sequence_parallel=True)


@pytest.mark.parametrize(
    "distributed_optimizer",
    [pytest.param(False, id="plain", marks=pytest.mark.slow), pytest.param(True, id="distributed-optimizer")],
)
def test_any_layout_continues_as_if_nothing_had_happened(tmp_path: Path, distributed_optimizer: bool) -> None:
    hf = save_tiny_model(tmp_path / "hf", tied=True)

    def layout(**sizes: Any) -> ParallelConfig:
        return ParallelConfig(distributed_optimizer=distributed_optimizer, **sizes)

    before = layout(tp=2, pp=2, sequence_parallel=True)
    through = run_distributed_test(train, 4, hf, tmp_path / "ck", before, range(6), save_at=3)[0]
    for world_size, parallel in ((1, layout()), (4, layout(pp=2)), (4, before)):
        for ours in run_distributed_test(train, world_size, hf, tmp_path / "ck", parallel, range(3, 6)):
            for (loss, norm), (expected_loss, expected_norm) in zip(ours, through[6:], strict=True):
                assert loss == pytest.approx(expected_loss, abs=1e-5)
                assert norm == pytest.approx(expected_norm, abs=1e-4)
        if parallel == before:
            assert ours == through[6:], "the same layout must continue bit-equal"


def test_bfloat16_and_background_save_continue_bit_equal(tmp_path: Path) -> None:
    hf = save_tiny_model(tmp_path / "hf")
    parallel = ParallelConfig(pp=2, distributed_optimizer=True)
    arguments: dict[str, Any] = {"dtype": "bfloat16", "async_save": True}
    through = run_distributed_test(train, 4, hf, tmp_path / "ck", parallel, range(4), save_at=2, **arguments)
    resumed = run_distributed_test(train, 4, hf, tmp_path / "ck", parallel, range(2, 4), **arguments)
    assert resumed[0] == through[0][4:]


def test_weights_alone_load_and_a_critic_takes_an_actors_trunk(tmp_path: Path) -> None:
    hf = save_tiny_model(tmp_path / "hf")
    run_distributed_test(train, 4, hf, tmp_path / "ck", TP2PP2, range(1), save_at=1)

    def body() -> tuple[list[float], list[float]]:
        runtime.start(ParallelConfig(), 3, 60)
        arch, config = Architecture.from_hf(hf), ModelConfig(hf=str(hf), dtype="float32")
        actor, critic = (build(arch, config, ParallelConfig()) for build in (build_actor, build_critic))
        component = tmp_path / "ck" / "iter_0000001" / "actor"
        head = critic.value_head.weight.clone()
        load_model(actor, component)
        load_model(critic, component, without="value_head.")
        assert (critic.value_head.weight == head).all()
        name = "decoder.layers.3.mlp.linear_fc2.weight"
        return actor.get_parameter(name).flatten().tolist(), critic.get_parameter(name).flatten().tolist()

    ours, trunk = run_distributed_test(body, 1)[0]
    assert ours == trunk


def test_an_exported_critic_gives_its_values_in_transformers(tmp_path: Path) -> None:
    hf = save_tiny_model(tmp_path / "hf", "llama", tied=True)
    run_distributed_test(train, 4, hf, tmp_path / "ck", TP2PP2, range(1), save_at=1)
    component = tmp_path / "ck" / "iter_0000001" / "critic"
    export_hf(component, tmp_path / "out", verify_logits=False)
    sequences = make_sequences(5, count=3)

    def body() -> list[list[float]]:
        _, critic = start(hf, ParallelConfig())
        load_model(critic.model, component)
        packed = pack_all(sequences, 160)
        return [row.tolist() for row in unpack_all(packed, critic.values(packed))]

    ours = run_distributed_test(body, 1)[0]
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "out").eval()
    for sequence, values in zip(sequences, ours, strict=True):
        with torch.no_grad():
            theirs = model(torch.tensor([sequence.token_ids])).logits[0, :-1, 0]
        assert (torch.tensor(values[1:]) - theirs).abs().max() <= 1e-4


def test_damage_is_found_and_the_checkpoint_before_is_used(tmp_path: Path) -> None:
    hf = save_tiny_model(tmp_path / "hf")
    folder = tmp_path / "ck"

    def save_three() -> None:
        actor, _ = start(hf, ParallelConfig())
        checkpoints = checkpoint_folder(folder, hf)
        for iteration in (1, 2, 3):
            checkpoints.save(iteration, {"actor": actor}, {})

    run_distributed_test(save_three, 1)
    assert [path.name for path in sorted(complete_checkpoints(folder))] == ["iter_0000002", "iter_0000003"]
    shard = max((folder / "iter_0000003" / "actor").glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(bytes(content))
    with pytest.raises(UserError, match="corrupt"):
        verify_manifest(folder / "iter_0000003")

    def resume() -> tuple[int, str]:
        actor, _ = start(hf, ParallelConfig())
        sys.stdout = printed = io.StringIO()
        resumed = checkpoint_folder(folder, hf).resume({"actor": actor})
        return (resumed.iteration if resumed else -1), printed.getvalue()

    ((iteration, printed),) = run_distributed_test(resume, 1)
    assert iteration == 2
    assert printed.startswith("warning: skipping a damaged checkpoint") and f"{shard.name}: corrupt" in printed


def test_all_ranks_agree_on_what_is_due(tmp_path: Path) -> None:
    """By number, by the main rank's clock, and by its log."""
    hf = save_tiny_model(tmp_path / "hf")
    best = KeepBestConfig("evaluation/avg", count=1)
    chosen = {
        "every": CheckpointConfig(save_every=4, keep_every=3),
        "at once": CheckpointConfig(save_every=4, save_every_s=1e-9),
        "in a day": CheckpointConfig(save_every=4, save_every_s=86400.0),
        "best": CheckpointConfig(save_every=4, keep_best=best),
    }

    def body() -> dict[str, list[int]]:
        actor, _ = start(hf, ParallelConfig(dp=2))
        config = Config()
        config.model.hf = str(hf)
        due: dict[str, list[int]] = {}
        for name, settings in chosen.items():
            checkpoints = CheckpointFolder(tmp_path / name / "checkpoints", config, settings)
            assert checkpoints.resume({"actor": actor}) is None
            due[name] = []
            for iteration, score in enumerate((0.1, 0.3, 0.2, 0.25, 0.4), start=1):
                if actor.runtime.is_main:  # others need not know
                    checkpoints.note(iteration, {"evaluation/avg": score})
                if checkpoints.is_due(iteration):
                    due[name].append(iteration)
                    if name == "best":
                        checkpoints.save(iteration, {"actor": actor}, {})
        return due

    expected = {"every": [3, 4], "at once": [1, 2, 3, 4, 5], "in a day": [4], "best": [1, 2, 4, 5]}
    assert run_distributed_test(body, 2) == [expected, expected]
    assert [path.name for path in sorted((tmp_path / "best" / "kept").iterdir())] == ["best", "iter_0000005"]
    verify_manifest(tmp_path / "best" / "kept" / "best")


def test_checkpoints_of_another_model_or_chain_are_refused_in_words(tmp_path: Path) -> None:
    small = save_tiny_model(tmp_path / "small", num_hidden_layers=2)
    large = save_tiny_model(tmp_path / "large")

    def save() -> None:
        actor, _ = start(small, ParallelConfig())
        checkpoint_folder(tmp_path / "ck", small).save(1, {"actor": actor}, {})

    def error_of(hf: Path, *names: str) -> str:
        def resume() -> str:
            learners = dict(zip(("actor", "critic"), start(hf, ParallelConfig()), strict=True))
            checkpoints = checkpoint_folder(tmp_path / "ck", hf)
            with pytest.raises(UserError) as failure:
                checkpoints.resume({name: learners[name] for name in names})
            return str(failure.value)

        return run_distributed_test(resume, 1)[0]

    run_distributed_test(save, 1)
    assert "iter_0000001: the actor is another model than model.hf: num_layers 2 (not 4)" in error_of(large, "actor")
    assert "iter_0000001: holds actor but no critic: remove" in error_of(small, "actor", "critic")


def test_a_kill_in_the_middle_of_a_save_costs_only_that_save(tmp_path: Path) -> None:
    hf = save_tiny_model(tmp_path / "hf")
    folder = tmp_path / "ck"

    def save_and_die() -> None:
        actor, _ = start(hf, ParallelConfig())
        checkpoints = checkpoint_folder(folder, hf)
        checkpoints.save(1, {"actor": actor}, {})
        write_text = checkpoint_module.write_text

        def die_at_the_state_file(path: Path, content: str) -> None:
            if path.name == "state.json":
                os.kill(os.getpid(), signal.SIGKILL)
            write_text(path, content)

        checkpoint_module.write_text = die_at_the_state_file
        checkpoints.save(2, {"actor": actor}, {})

    with pytest.raises(RanksFailed):
        run_distributed_test(save_and_die, 1)
    assert (folder / ".iter_0000002.tmp").is_dir() and not (folder / "iter_0000002").exists()

    def resume() -> int:
        actor, _ = start(hf, ParallelConfig())
        resumed = checkpoint_folder(folder, hf).resume({"actor": actor})
        return resumed.iteration if resumed else -1

    assert run_distributed_test(resume, 1) == [1]
    assert not (folder / ".iter_0000002.tmp").exists()
    assert json.loads((folder / "iter_0000001" / "state.json").read_text())["iteration"] == 1


def test_a_background_save_holds_the_state_of_its_moment(tmp_path: Path) -> None:
    """What the stage appends to its lists while the writers work belongs to the next checkpoint."""
    hf = save_tiny_model(tmp_path / "hf")

    def body() -> dict[str, Any]:
        actor, _ = start(hf, ParallelConfig())
        checkpoints = checkpoint_folder(tmp_path / "ck", hf, async_save=True)
        history = [1]
        checkpoints.save(1, {"actor": actor}, {"history": history})
        history.append(2)
        checkpoints.finish()
        resumed = checkpoints.resume({"actor": actor})
        assert resumed is not None
        return resumed.state

    assert run_distributed_test(body, 1) == [{"history": [1]}]


@pytest.mark.parametrize("async_save", [False, True])
def test_a_writer_that_hangs_is_not_waited_for_without_end(tmp_path: Path, async_save: bool) -> None:
    hf = save_tiny_model(tmp_path / "hf")

    def body() -> None:
        actor, _ = start(hf, ParallelConfig(), timeout_s=2.0)
        # A file system that does not answer.
        checkpoint_writer._HashedFile.write = lambda *_: time.sleep(600)  # type: ignore[method-assign,assignment]
        checkpoints = checkpoint_folder(tmp_path / "ck", hf, async_save=async_save)
        checkpoints.save(1, {"actor": actor}, {})
        checkpoints.finish()

    with pytest.raises(
        RanksFailed, match=r"rank 0: writing .*iter_0000001\.tmp has made no progress for 2 s"
    ) as failure:
        run_distributed_test(body, 1, timeout_s=30)
    assert "rank 0: exit code 1" in str(failure.value)


@pytest.mark.parametrize("async_save", [False, True])
def test_a_writer_that_fails_fails_every_rank_and_leaves_no_checkpoint(tmp_path: Path, async_save: bool) -> None:
    hf = save_tiny_model(tmp_path / "hf")

    def body() -> str:
        parallel = ParallelConfig(distributed_optimizer=True)
        actor, _ = start(hf, parallel)
        checkpoints = checkpoint_folder(tmp_path / "ck", hf, async_save=async_save)
        if actor.runtime.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a full disk, for this rank: EFBIG
        # The main rank, whose message is shown, names the file and what to do.
        named = (UserError, r"/__1_\d\.distcp: File too large: make room")
        kind, text = named if actor.runtime.rank == 0 else ((UserError, RuntimeError), "")
        with pytest.raises(kind, match=text) as failure:
            checkpoints.save(1, {"actor": actor}, {})
            checkpoints.finish()
        return str(failure.value)

    run_distributed_test(body, 2, timeout_s=30)
    assert not complete_checkpoints(tmp_path / "ck")


def test_a_rank_that_ends_does_not_wait_for_its_writers(tmp_path: Path) -> None:
    """An error elsewhere ends the stage: what was being written could not become a checkpoint."""

    def write() -> None:
        with checkpoint_writer._HashedFile(tmp_path / "file") as stream:
            for _ in range(600):
                stream.write(b"x")
                time.sleep(0.1)

    def rank() -> None:
        threading.Thread(target=write).start()
        raise SystemExit(2)

    process = multiprocessing.get_context("fork").Process(target=rank)
    process.start()
    process.join(50)
    try:
        assert process.exitcode == 2
    finally:
        process.kill()


def test_a_changed_configuration_is_reported(tmp_path: Path) -> None:
    hf = save_tiny_model(tmp_path / "hf")

    def body() -> list[str]:
        actor, _ = start(hf, ParallelConfig())
        checkpoint_folder(tmp_path / "ck", hf).save(1, {"actor": actor}, {})
        printed = []
        for seed in (0, 1):
            sys.stdout = output = io.StringIO()
            checkpoint_folder(tmp_path / "ck", hf, seed=seed).resume({"actor": actor})
            printed.append(output.getvalue())
        return printed

    same, changed = run_distributed_test(body, 1)[0]
    assert same == "" and "iter_0000001 was saved under another configuration" in changed


def test_a_background_save_of_two_components_holds_both_as_they_were(tmp_path: Path) -> None:
    """They are written at one time, the first one last, while training changes every tensor."""
    hf = save_tiny_model(tmp_path / "hf")
    write = checkpoint_writer._Writer._write

    def delayed(self: Any, *args: Any) -> None:
        time.sleep(0.5 if "/actor" in str(self.path) else 0.0)
        write(self, *args)

    def body() -> bool:
        learners = dict(zip(("actor", "critic"), start(hf, ParallelConfig()), strict=True))
        checkpoint_writer._Writer._write = delayed  # type: ignore[method-assign,assignment]
        checkpoints = checkpoint_folder(tmp_path / "ck", hf, async_save=True)
        checkpoints.save(1, learners, {})
        saved = {name: [p.detach().clone() for p in learner.model.parameters()] for name, learner in learners.items()}
        with torch.no_grad():
            for learner in learners.values():
                for parameter in learner.model.parameters():
                    parameter.zero_()
        checkpoints.finish()
        assert checkpoints.resume(learners) is not None
        return all(torch.equal(a, b) for name in saved for a, b in zip(saved[name], learners[name].model.parameters()))

    assert run_distributed_test(body, 1) == [True]
