"""PPO's critic starts with the moments of its value pretraining, or with none (ppo.critic.moments)."""

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_vcppo.config import Config, Dtype, ParallelConfig
from megatron_vcppo.mcore.checkpoint import load_model
from megatron_vcppo.mcore.checkpoint_state import adam_steps, owned_ranges
from megatron_vcppo.mcore.learner import Critic
from megatron_vcppo.stages.initial_models import continue_pretraining
from tests.helpers.checkpoints import checkpoint_folder
from tests.helpers.distributed import run_distributed_test
from tests.helpers.training import start, step
from tools.benchmarks._tiny_models import save_tiny_model

STEPS = 2


@pytest.mark.parametrize(
    ("parallel", "dtype"),
    [(ParallelConfig(), "float32"), (ParallelConfig(dp=2, distributed_optimizer=True), "bfloat16")],
    ids=["plain", "distributed-optimizer"],
)
def test_moments_are_kept_or_reset_and_main_weights_stay(
    tmp_path: Path, parallel: ParallelConfig, dtype: Dtype
) -> None:
    hf, folder = save_tiny_model(tmp_path / "hf"), tmp_path / "ck" / "iter_0000002" / "critic"

    def pretrain() -> list[dict[str, Tensor]]:
        _, critic = start(hf, parallel, dtype)
        for seed in range(STEPS):
            step(critic, parallel, seed)
        checkpoint_folder(tmp_path / "ck", hf).save(STEPS, {"critic": critic}, {})
        return state_of(critic)

    def begin(moments: Any) -> tuple[list[dict[str, Tensor]], int, int, str]:
        _, critic = start(hf, parallel, dtype, prepare=lambda model: load_model(model, folder))
        config = Config()
        config.ppo.critic.init, config.ppo.critic.checkpoint_path = "checkpoint", str(folder)
        config.ppo.critic.moments = moments
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            continue_pretraining(critic, config)
        return state_of(critic), adam_steps(critic.optimizer), critic.optimizer_steps, printed.getvalue()

    ranks = parallel.dp or 1
    pretrained = run_distributed_test(pretrain, ranks)
    texts = {"keep": f"continue after {STEPS} steps of {folder}", "reset": "start at zero (ppo.critic.moments reset)"}
    for moments, text in texts.items():
        begun = run_distributed_test(begin, ranks, moments)
        assert f"Adam's moments of the critic {text}" in begun[0][3]
        for expected, (found, steps, schedule_steps, _) in zip(pretrained, begun, strict=True):
            assert (steps, schedule_steps) == (STEPS if moments == "keep" else 0, 0)
            for ours, theirs in zip(found, expected, strict=True):
                for name, tensor in theirs.items():
                    is_zero = moments == "reset" and name.startswith("exp_avg")
                    assert torch.equal(ours[name], torch.zeros_like(tensor) if is_zero else tensor), name


def test_after_a_reset_training_is_that_of_a_new_optimizer(tmp_path: Path) -> None:
    hf, folder, parallel = (
        save_tiny_model(tmp_path / "hf"),
        tmp_path / "ck" / "iter_0000002" / "critic",
        ParallelConfig(),
    )

    def pretrain() -> None:
        _, critic = start(hf, parallel)
        for seed in range(STEPS):
            step(critic, parallel, seed)
        checkpoint_folder(tmp_path / "ck", hf).save(STEPS, {"critic": critic}, {})

    def train(moments: Any) -> list[tuple[float, float]]:
        _, critic = start(hf, parallel, prepare=lambda model: load_model(model, folder))
        config = Config()
        config.ppo.critic.init, config.ppo.critic.checkpoint_path = "checkpoint", str(folder)
        if moments is not None:
            config.ppo.critic.moments = moments
            continue_pretraining(critic, config)
        return [step(critic, parallel, seed) for seed in range(STEPS, STEPS + 3)]

    run_distributed_test(pretrain, 1)
    new, reset, kept = (run_distributed_test(train, 1, moments)[0] for moments in (None, "reset", "keep"))
    assert reset == new and kept[0] == new[0] and kept[1] != new[1]


def state_of(critic: Critic) -> list[dict[str, Tensor]]:
    """Of what this rank's optimizer owns: the weights and the optimizer's own tensors."""
    ranges = owned_ranges(critic.optimizer)
    return [
        {"weight": owned.weight.clone(), **{name: tensor.clone() for name, tensor in owned.state.items()}}
        for owned in ranges
    ]
