"""The value head is float32 in bfloat16 critics: small steps near 1, checkpoints, heads that were saved in bfloat16."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_vcppo.config.schema import OptimizerConfig, ParallelConfig, ScheduleConfig
from megatron_vcppo.hf.convert.exporter import export_hf
from megatron_vcppo.mcore import runtime
from megatron_vcppo.mcore.checkpoint import load_model
from megatron_vcppo.mcore.learner import Critic
from tests.helpers.checkpoints import checkpoint_folder
from tests.helpers.distributed import run_distributed_test
from tests.helpers.te.scenarios import Case, make_learner, packed, train
from tools.benchmarks._tiny_models import save_tiny_model

TARGET = 1.003
"""bfloat16 has 1 and 1.0078 next to each other."""
LAYOUTS = {
    "plain": (1, ParallelConfig()),
    "tp2-sequence-parallel": (2, ParallelConfig(tp=2, sequence_parallel=True)),
    "dp2-distributed-optimizer": (2, ParallelConfig(distributed_optimizer=True)),
}


def bf16_critic(hf: Path, parallel: ParallelConfig, lr: float = 1e-3) -> Case:
    return Case(hf, {"dtype": "bfloat16"}, parallel, "critic", OptimizerConfig(lr=lr))


@pytest.mark.parametrize(("num_ranks", "parallel"), LAYOUTS.values(), ids=LAYOUTS)
def test_a_value_near_one_moves_in_small_steps(tmp_path: Path, num_ranks: int, parallel: ParallelConfig) -> None:
    case = bf16_critic(save_tiny_model(tmp_path / "hf", num_hidden_layers=2), parallel, lr=5e-6)

    def body() -> list[float]:
        runtime.start(parallel, seed=3, timeout_s=60)
        critic: Any = make_learner(case)
        head = critic.model.value_head
        assert head.weight.dtype == head.bias.dtype == torch.float32
        assert critic.model.decoder.final_layernorm.weight.dtype == torch.bfloat16
        head.weight.data.zero_()
        head.bias.data.fill_(1.0)
        critic.optimizer.reload_model_params()
        microbatches = packed(case, 0)
        num_tokens = sum(m.num_tokens for m in microbatches) * critic.runtime.dp_size
        errors = []
        for _ in range(15):
            critic.train_step(microbatches, lambda v, m: (0.5 * (v - TARGET).square().sum() / num_tokens, {}))
            errors.append(float(torch.cat([(v - TARGET).abs() for v in critic.values(microbatches)]).mean()))
        return errors

    for errors in run_distributed_test(body, num_ranks):
        steps = [before - after for before, after in itertools.pairwise(errors)]
        assert errors[0] > 0.0028 and errors[-1] < 0.0013 and all(0 < step < 0.0002 for step in steps), errors


@pytest.mark.parametrize("distributed", [False, True], ids=["plain", "distributed-optimizer"])
def test_training_resumes_bit_equal(tmp_path: Path, distributed: bool) -> None:
    hf = save_tiny_model(tmp_path / "hf", num_hidden_layers=2)
    case = bf16_critic(hf, ParallelConfig(distributed_optimizer=distributed))
    through = run_distributed_test(train, 1, case, tmp_path / "ck", range(4), save_at=2)[0]
    resumed = run_distributed_test(train, 1, case, tmp_path / "ck", range(2, 4))[0]
    for name, value in through["saved"].items():
        assert torch.equal(value, resumed["loaded"][name]), name
    assert resumed["history"] == through["history"][2:]


@pytest.mark.parametrize("distributed", [False, True], ids=["plain", "distributed-optimizer"])
def test_a_head_that_was_saved_in_bfloat16_loads(tmp_path: Path, distributed: bool) -> None:
    """Weights alone as they were; with the optimizer, its float32 copy, which is the more precise one."""
    hf = save_tiny_model(tmp_path / "hf", num_hidden_layers=2)
    case = bf16_critic(hf, ParallelConfig(distributed_optimizer=distributed))

    def save_as_before() -> tuple[torch.Tensor, torch.Tensor]:
        runtime.start(case.parallel, seed=3, timeout_s=60)
        model: Any = make_learner(case).model
        model.value_head.to(torch.bfloat16)
        critic = Critic(model, case.parallel, case.optimizer, ScheduleConfig(), 10)
        copy = model.value_head.weight.main_param
        with torch.no_grad():
            copy.add_(1e-4)
        checkpoint_folder(tmp_path / "ck", hf).save(1, {"critic": critic}, {})
        return critic.model.value_head.weight.detach().float(), copy.detach().view(1, -1).clone()

    def load() -> tuple[torch.Tensor, torch.Tensor]:
        runtime.start(case.parallel, seed=4, timeout_s=60)
        critic: Any = make_learner(case)
        load_model(critic.model, tmp_path / "ck" / "iter_0000001" / "critic")
        alone = critic.model.value_head.weight.detach().clone()
        assert checkpoint_folder(tmp_path / "ck", hf).resume({"critic": critic}) is not None
        return alone, critic.model.value_head.weight.detach().clone()

    (weight, copy), (alone, resumed) = (run_distributed_test(body, 1)[0] for body in (save_as_before, load))
    assert not torch.equal(weight, copy)
    assert torch.equal(alone, weight) and torch.equal(resumed, copy)


def test_an_export_keeps_the_float32_head(tmp_path: Path) -> None:
    hf = save_tiny_model(tmp_path / "hf", num_hidden_layers=2)
    critic = tmp_path / "ck" / "iter_0000001" / "critic"
    found = run_distributed_test(train, 1, bf16_critic(hf, ParallelConfig()), tmp_path / "ck", range(1), save_at=1)[0]
    export_hf(critic, tmp_path / "out", verify_logits=False)
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(exported["score.weight"].flatten(), found["saved"]["param of value_head.weight"])
    assert exported["model.norm.weight"].dtype == torch.bfloat16
    export_hf(critic, tmp_path / "narrow", torch.bfloat16, verify_logits=False)
    assert load_file(tmp_path / "narrow" / "model.safetensors")["score.weight"].dtype == torch.bfloat16
