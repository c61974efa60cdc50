"""parallel.overlap with the distributed optimizer: who reads parameters after a step reads the new ones."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vcppo.config.schema import ParallelConfig
from megatron_vcppo.mcore import runtime
from megatron_vcppo.mcore.checkpoint import load_model
from megatron_vcppo.mcore.learner import Actor
from megatron_vcppo.stages.ppo_models import push_actor
from tests.helpers.checkpoints import checkpoint_folder
from tests.helpers.distributed import run_distributed_test
from tests.helpers.te.scenarios import Case, make_learner, packed, train_step
from tools.benchmarks._tiny_models import save_tiny_model


class Recorder:
    """Takes the place of the engines: keeps what a push sends."""

    def push(self, version: int, source: Any) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in source()}


def two_steps(case: Case, folder: Path) -> list[dict[str, torch.Tensor]]:
    """After each of two steps: what the push sends, then log-probs; at the end, what a checkpoint holds."""
    runtime.start(case.parallel, seed=3, timeout_s=60)
    actor = make_learner(case)
    assert isinstance(actor, Actor)
    engines: Any = Recorder()
    found: list[Any] = []
    for seed in (0, 1):
        train_step(actor, case, seed)
        found.append(push_actor(actor, engines, seed))
        found.append({"logprobs": torch.cat(actor.logprobs(packed(case, 5)))})
    train_step(actor, case, 2)
    checkpoint_folder(folder, case.hf).save(3, {"actor": actor}, {})
    saved = make_learner(case).model
    load_model(saved, folder / "iter_0000003" / "actor")
    found.append({name: p.detach().clone() for name, p in saved.named_parameters()})
    return found


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_push_save_and_forward_passes_read_the_steps_parameters(tmp_path: Path, tied: bool) -> None:
    hf = save_tiny_model(tmp_path / "hf", tied=tied, num_hidden_layers=2)
    at_once = Case(hf, parallel=ParallelConfig(distributed_optimizer=True))
    overlapped = Case(hf, parallel=ParallelConfig(distributed_optimizer=True, overlap=True))
    expected = run_distributed_test(two_steps, 2, at_once, tmp_path / "a")[0]
    assert not all(torch.equal(a, b) for a, b in zip(expected[0].values(), expected[2].values(), strict=True))
    for rank, ours in enumerate(run_distributed_test(two_steps, 2, overlapped, tmp_path / "b")):
        for moment, (found, wanted) in enumerate(zip(ours, expected, strict=True)):
            for name in wanted:
                assert torch.equal(found[name], wanted[name]), f"rank {rank}, moment {moment}: {name}"
