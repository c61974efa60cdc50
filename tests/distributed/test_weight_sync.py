"""Pushes from live Megatron ranks under several layouts into engines of several layouts: a fresh engine's output.

Each engine is started from the target checkpoint and its greedy output recorded: that is the fresh engine. Then other
weights and then the target's are pushed from every Megatron layout; after that, the output must be the fresh engine's
again (after the other weights alone, it is not).
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vcppo.config import Config, ModelConfig, OptimizerConfig, ParallelConfig, ScheduleConfig
from megatron_vcppo.data.packing import pack_all, unpack_all
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.mcore import runtime
from megatron_vcppo.mcore.hf_weights_io import load_hf, stream_hf
from megatron_vcppo.mcore.learner import Actor
from megatron_vcppo.mcore.model import build_actor
from megatron_vcppo.records import Rollout, TrainSequence
from megatron_vcppo.rollout import messages
from megatron_vcppo.rollout.messages import Sampling
from megatron_vcppo.weight_sync.rank_role import make_weight_sync, role_of
from megatron_vcppo.weight_sync.sync import PushResult
from tests.helpers.distributed import run_distributed_test
from tools.benchmarks._rollout_node import RolloutNode, make_prompts, save_policy
from tools.benchmarks._tiny_models import YARN

pytestmark = pytest.mark.timeout(400)

PROMPTS = make_prompts(8)
LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (2, 1, 2), (1, 2, 2)]
"""Tensor-, pipeline- and data-parallel sizes of the trainer, whose ranks all send; each alone streams the same bytes
(test_export_stream.py)."""


def push(
    folders: list[Path], versions: list[int], rendezvous: Path, tp: int, pp: int, dp: int, **experts: Any
) -> list[PushResult]:
    """One rank: load each checkpoint into a live actor and push it."""
    parallel = ParallelConfig(tp=tp, pp=pp, dp=dp, **experts)
    me = runtime.start(parallel, seed=1, timeout_s=60)
    config = Config()
    config.weight_sync.timeout_s, config.weight_sync.bucket_mib, config.weight_sync.verify = 60.0, 1, True
    role = role_of(me, config.weight_sync.max_senders)
    sync = make_weight_sync(config, rendezvous, role, torch.device("cpu"))
    results = []
    model = build_actor(Architecture.from_hf(folders[0]), ModelConfig(hf=str(folders[0]), dtype="float32"), parallel)
    for folder, version in zip(folders, versions):
        load_hf(model, folder)
        results.append(sync.sync(version, lambda: stream_hf(model)))
    return results


def logprobs(folder: Path, sequences: list[TrainSequence], tp: int, pp: int) -> list[list[float]]:
    """One rank: Megatron's log-probs of every token but the first."""
    parallel = ParallelConfig(tp=tp, pp=pp, sequence_parallel=True)
    runtime.start(parallel, seed=1, timeout_s=60)
    model = build_actor(Architecture.from_hf(folder), ModelConfig(hf=str(folder), dtype="float32"), parallel)
    load_hf(model, folder)
    actor = Actor(model, parallel, OptimizerConfig(), ScheduleConfig(), total_steps=1)
    packed = pack_all(sequences, 256, multiple=tp)
    return [[float(value) for value in row] for row in unpack_all(packed, actor.logprobs(packed))]


def check_logprob_gap(folder: Path, rollouts: list[Rollout]) -> None:
    """vLLM's log-probs of sampled responses are Megatron's, within 1e-3 per token."""
    sequences = [TrainSequence((*rollout.prompt.token_ids, *rollout.response_ids)) for rollout in rollouts]
    rows = run_distributed_test(logprobs, 4, folder, sequences, 2, 2)[-1]
    for rollout, row in zip(rollouts, rows):
        trained = torch.tensor(row[len(row) - len(rollout.response_ids) :])
        assert (trained - torch.tensor(rollout.rollout_logprobs)).abs().max() <= 1e-3


def case(family: str, tied: bool, layouts: list[tuple[int, int, int]] | None = None, **engine: int) -> Any:
    """Model family, tied embeddings, layout of the engine. Slow with all of the trainer's layouts, quick with some."""
    layout = "-".join(f"{key}{value}" for key, value in engine.items()) or "tp1"
    name = f"{family}-{'tied' if tied else 'untied'}-{layout}" + ("-quick" if layouts else "")
    marks = () if layouts else pytest.mark.slow
    return pytest.param(family, tied, layouts or LAYOUTS, engine, id=name, marks=marks)


@pytest.mark.parametrize(
    ("family", "tied", "layouts", "engine"),
    [
        # Engines with tp 1 and tied embeddings get pushes in tests/rollout/test_node.py and in every test of a stage.
        case("qwen3", False, layouts=[(1, 1, 1), (1, 2, 2)], tp=2),
        case("qwen2", True),
        case("qwen3", False, tp=2),
        case("qwen2", False, dp=2),
        case("qwen3", True),
        case("qwen2", False),
        case("qwen3", False),
        case("qwen3", True, tp=2),
        case("qwen2", True, dp=2),
    ],
)
def test_greedy_output_after_a_push_is_a_fresh_engines(tmp_path, family, tied, layouts, engine) -> None:
    target = save_policy(tmp_path / "target", family, tied, seed=1)
    other = save_policy(tmp_path / "other", family, tied, seed=2)
    with RolloutNode(tmp_path / "node", target, {"engine": engine}) as node:
        node.wait(1)
        fresh = node.greedy(messages.NO_VERSION, PROMPTS)
        run_distributed_test(push, 1, [other], [1], node.rendezvous, 1, 1, 1)
        assert node.greedy(1, PROMPTS) != fresh
        for version, (tp, pp, dp) in enumerate(layouts, start=2):
            versions = [100 + version, version]
            per_rank = run_distributed_test(push, tp * pp * dp, [other, target], versions, node.rendezvous, tp, pp, dp)
            assert node.greedy(version, PROMPTS) == fresh, f"trainer tp {tp} pp {pp} dp {dp}"
            assert len({str(results) for results in per_rank}) == 1, "the ranks disagree on what was pushed"
        check_logprob_gap(target, node.client(max_tokens=32).generate(PROMPTS, 0, version, Sampling(), 2))


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        {"family": "mistral"},
        {"family": "olmo2"},
        {"family": "gemma3_text", "tied": True},
        {"family": "qwen2", "rope_parameters": YARN},
    ],
    ids=["mistral", "olmo2", "gemma3", "yarn"],
)
def test_engines_compute_what_the_trainer_does(tmp_path: Path, model: dict[str, Any]) -> None:
    """Of models whose attention, norms or positions differ: pushed, greedy output and log-probs."""
    target, other = (save_policy(tmp_path / str(seed), seed=seed, **model) for seed in (1, 2))
    with RolloutNode(tmp_path / "node", target, {}) as node:
        node.wait(1)
        fresh = node.greedy(messages.NO_VERSION, PROMPTS)
        run_distributed_test(push, 4, [other, target], [1, 2], node.rendezvous, 2, 2, 1)
        assert node.greedy(2, PROMPTS) == fresh
        check_logprob_gap(target, node.client(max_tokens=48).generate(PROMPTS, 0, 2, Sampling(), 2))


@pytest.mark.slow
def test_an_engine_whose_folder_has_no_weights_gets_them_by_a_push(tmp_path: Path) -> None:
    """As where model.weights has them."""
    target = save_policy(tmp_path / "target", seed=1)
    bare = Path(shutil.copytree(target, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors")))
    with RolloutNode(tmp_path / "node", bare, {}, weights=tmp_path / "elsewhere") as node:
        node.wait(1)
        run_distributed_test(push, 1, [target], [1], node.rendezvous, 1, 1, 1)
        check_logprob_gap(target, node.client(max_tokens=32).generate(PROMPTS, 0, 1, Sampling(), 2))


@pytest.mark.slow
def test_experts_of_all_ranks_reach_the_engine(tmp_path) -> None:
    """The same of a mixture whose experts are divided over replicas; a dense layer is among its layers."""
    target, other = (
        save_policy(tmp_path / str(seed), "qwen3_moe", seed=seed, num_hidden_layers=2, mlp_only_layers=[0])
        for seed in (1, 2)
    )
    with RolloutNode(tmp_path / "node", target, {}) as node:
        node.wait(1)
        fresh = node.greedy(messages.NO_VERSION, PROMPTS)
        folders, versions = [other, target], [1, 2]
        run_distributed_test(push, 2, folders[:1], versions, node.rendezvous, 1, 1, 2, ep=2)
        assert node.greedy(1, PROMPTS) != fresh
        layout = {"sequence_parallel": True, "ep": 4}
        run_distributed_test(push, 4, folders, [101, 2], node.rendezvous, 2, 1, 2, **layout)
        assert node.greedy(2, PROMPTS) == fresh
        check_logprob_gap(target, node.client(max_tokens=32).generate(PROMPTS, 0, 2, Sampling(), 2))
