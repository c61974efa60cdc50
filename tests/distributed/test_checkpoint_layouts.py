"""What a checkpoint holds does not depend on the layout, the optimizer or the version of the format that wrote it."""

import queue
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch import Tensor
from torch.nn import functional

from megatron_vcppo.config import Dtype, ParallelConfig
from megatron_vcppo.hf.frozen import frozen_names
from megatron_vcppo.mcore.checkpoint import load_learner
from megatron_vcppo.mcore.checkpoint_state import adam_steps, owned_ranges, tensors_to_save
from megatron_vcppo.mcore.frozen import freeze
from megatron_vcppo.mcore.learner import Learner
from megatron_vcppo.mcore.model import CriticModel
from tests.helpers.checkpoints import checkpoint_folder, stored_tensors, torchs_own
from tests.helpers.distributed import run_distributed_test
from tests.helpers.training import start, step
from tools.benchmarks._tiny_models import save_tiny_model

STEPS = 2
STATE = "optimizer.state"


def distributed(**sizes: Any) -> ParallelConfig:
    return ParallelConfig(distributed_optimizer=True, **sizes)


def trained(
    hf: Path, parallel: ParallelConfig, dtype: Dtype, prepare: Callable[[CriticModel], None] = lambda critic: None
) -> dict[str, Learner]:
    actor, critic = start(hf, parallel, dtype, prepare=prepare)
    for i in range(STEPS):
        step(actor, parallel, i)
        step(critic, parallel, i)
    return {"actor": actor, "critic": critic}


def save_trained(hf: Path, folder: Path, parallel: ParallelConfig, dtype: Dtype = "float32") -> None:
    learners = trained(hf, parallel, dtype)
    checkpoint_folder(folder, hf).save(1, learners, {})


def head_in_the_models_type(critic: CriticModel) -> None:
    """The value head as it was in checkpoints of Megatron's own format."""
    head = critic.value_head.to(critic.config.params_dtype)
    head.forward = lambda hidden: functional.linear(hidden, head.weight, head.bias).squeeze(-1)


def save_trained_by_megatron(hf: Path, folder: Path, parallel: ParallelConfig, dtype: Dtype) -> None:
    """In the format of before: Megatron's own state of the optimizer, gathered on every data-parallel rank."""
    for name, learner in trained(hf, parallel, dtype, head_in_the_models_type).items():
        model = learner.model.sharded_state_dict()
        metadata = {"distrib_optim_sharding_type": "fully_reshardable"}
        state = learner.optimizer.sharded_state_dict(model, metadata=metadata)
        (folder / name).mkdir(parents=True, exist_ok=True)
        filesystem_async._results_queue = queue.Queue()  # not one of a process that imports torch first
        state = {"model": model, "optimizer": state, "optimizer_steps": learner.optimizer_steps}
        with torchs_own():
            dist_checkpointing.save(state, str(folder / name))


def load_and_save(hf: Path, source: Path, folder: Path, parallel: ParallelConfig, dtype: Dtype = "float32") -> None:
    """Under the layout; whatever a load leaves untouched is found later: it is not a number."""
    learners = dict(zip(("actor", "critic"), start(hf, parallel, dtype), strict=True))
    for name, learner in learners.items():
        with torch.no_grad():
            for parameter in learner.model.parameters():
                parameter.fill_(torch.nan)
            for owned in owned_ranges(learner.optimizer):
                for tensor in owned.state.values():
                    tensor.fill_(torch.nan)
        load_learner(learner, source / name)
        assert (adam_steps(learner.optimizer), learner.optimizer_steps) == (STEPS, STEPS)
    checkpoint_folder(folder, hf).save(1, learners, {})


def content(folder: Path) -> dict[str, Tensor]:
    """Every global tensor of both components, put together from its boxes."""

    parts = {name: stored_tensors(folder / name) for name in ("actor", "critic")}
    return {f"{name} {key}": value for name, part in parts.items() for key, value in part.items()}


def assert_equal(ours: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    differing = [key for key, tensor in expected.items() if not torch.equal(ours[key], tensor)]
    assert not differing


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_any_layout_and_optimizer_loads_and_saves_the_same(tmp_path: Path, dtype: Dtype) -> None:
    """Each loads what the one before saved; the last holds what the first did, bit for bit."""
    hf = save_tiny_model(tmp_path / "hf", tied=dtype == "bfloat16")
    run_distributed_test(save_trained, 4, hf, tmp_path / "0", distributed(), dtype)
    expected = content(tmp_path / "0" / "iter_0000001")
    names = {key.split(" ")[1].removeprefix(f"{STATE}.").split(".")[0] for key in expected if STATE in key}
    assert names == {"exp_avg", "exp_avg_sq"} | ({"param"} if dtype == "bfloat16" else set())
    layouts = [
        (3, distributed()),
        (4, distributed(tp=2, sequence_parallel=True)),
        (4, ParallelConfig(tp=2, pp=2)),
        (4, distributed(pp=2)),
        (2, ParallelConfig()),
        (3, distributed(pp=3)),
        (4, distributed(pp=2, first_stage_layers=3)),
        (4, distributed(cp=2)),
    ]
    for i, (world_size, parallel) in enumerate(layouts):
        source = tmp_path / str(i) / "iter_0000001"
        run_distributed_test(load_and_save, world_size, hf, source, tmp_path / str(i + 1), parallel, dtype)
    assert_equal(content(tmp_path / str(len(layouts)) / "iter_0000001"), expected)


@pytest.mark.parametrize(
    "dense_layers", [pytest.param([], id="stacked"), pytest.param([1], id="mixed", marks=pytest.mark.slow)]
)
def test_experts_reshard(tmp_path: Path, dense_layers: list[int]) -> None:
    """The same of a mixture of experts, over expert-parallel sizes; layers of two kinds are not stacked."""
    hf = save_tiny_model(tmp_path / "hf", "qwen3_moe", num_hidden_layers=2, mlp_only_layers=dense_layers)
    run_distributed_test(save_trained, 2, hf, tmp_path / "0", distributed(ep=2), "bfloat16")
    expected = content(tmp_path / "0" / "iter_0000001")
    prefix = "decoder.layers.0." if dense_layers else "decoder.layers."
    assert expected[f"actor {prefix}mlp.experts.experts.linear_fc1.weight"].shape[-3:] == (8, 96, 64)
    layouts = [
        (2, ParallelConfig(tp=2, sequence_parallel=True)),
        (4, distributed(pp=2, ep=2)),
    ]
    for i, (world_size, parallel) in enumerate(layouts):
        source = tmp_path / str(i) / "iter_0000001"
        run_distributed_test(load_and_save, world_size, hf, source, tmp_path / str(i + 1), parallel, "bfloat16")
    assert_equal(content(tmp_path / str(len(layouts)) / "iter_0000001"), expected)


@pytest.mark.parametrize(
    ("parallel", "dtype"),
    [
        pytest.param(distributed(), "bfloat16", id="distributed-bfloat16"),
        pytest.param(ParallelConfig(), "float32", id="plain-float32"),
        pytest.param(distributed(), "float32", id="distributed-float32", marks=pytest.mark.slow),
        pytest.param(ParallelConfig(), "bfloat16", id="plain-bfloat16", marks=pytest.mark.slow),
    ],
)
def test_checkpoints_of_megatrons_own_format_load(tmp_path: Path, parallel: ParallelConfig, dtype: Dtype) -> None:
    hf = save_tiny_model(tmp_path / "hf")
    run_distributed_test(save_trained_by_megatron, 2, hf, tmp_path / "old", parallel, dtype)
    run_distributed_test(load_and_save, 2, hf, tmp_path / "old", tmp_path / "new", distributed(tp=2), dtype)
    ours = content(tmp_path / "new" / "iter_0000001")
    old = {key.replace(".fp32_param.", ".param."): tensor for key, tensor in content(tmp_path / "old").items()}
    # A float32 weight is its main parameter.
    mains = {key for key in old if ".param." in key and (dtype == "float32" or "value_head" in key)}
    assert_equal(
        ours, {key: old[key] for key in ours} | {key.replace(f"{STATE}.param.", ""): old[key] for key in mains}
    )
    assert old.keys() - ours.keys() == mains


def test_another_dtype_takes_the_main_parameters_or_becomes_them(tmp_path: Path) -> None:
    hf = save_tiny_model(tmp_path / "hf")
    run_distributed_test(save_trained, 2, hf, tmp_path / "0", distributed(), "bfloat16")
    half = content(tmp_path / "0" / "iter_0000001")
    run_distributed_test(
        load_and_save, 2, hf, tmp_path / "0" / "iter_0000001", tmp_path / "1", ParallelConfig(), "float32"
    )
    single = content(tmp_path / "1" / "iter_0000001")
    for key, weight in single.items():
        if STATE not in key:
            component, name = key.split(" ")
            main = half.get(f"{component} {STATE}.param.{name}", half[key])  # the value head is float32 itself
            assert torch.equal(weight, main)
            assert "value_head" in key or not torch.equal(weight, half[key].float())
    run_distributed_test(
        load_and_save, 2, hf, tmp_path / "1" / "iter_0000001", tmp_path / "2", distributed(), "bfloat16"
    )
    assert_equal(content(tmp_path / "2" / "iter_0000001"), half)


ATTENTION = ["*.self_attn.*"]


def freeze_attention(critic: CriticModel) -> None:
    freeze(critic, frozen_names(critic.arch, ATTENTION, "ppo.critic.frozen"))


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_frozen_parameters_have_weights_alone_and_can_be_trained_later(tmp_path: Path, dtype: Dtype) -> None:
    hf = save_tiny_model(tmp_path / "hf")

    def save_frozen(source: Path | None, folder: Path, parallel: ParallelConfig, prepare: Any) -> int:
        learners = trained(hf, parallel, dtype, prepare) if source is None else {}
        if source is not None:
            learners = dict(zip(("actor", "critic"), start(hf, parallel, dtype, prepare=prepare), strict=True))
            for name, learner in learners.items():
                load_learner(learner, source / name)
        checkpoint_folder(folder, hf).save(1, learners, {})
        return sum(buffer.numel for buffer in learners["critic"].ddp.buffers)

    first, second, third = (tmp_path / name / "iter_0000001" for name in "012")
    (with_gradients, *_) = run_distributed_test(save_frozen, 2, None, first.parent, distributed(), freeze_attention)
    saved = content(first)
    kinds = ("linear_qkv.weight", "linear_qkv.bias", "linear_proj.weight")
    frozen = [f"critic decoder.layers.self_attention.{kind}" for kind in kinds]
    trained_ones = [key for key in saved if key.startswith("critic ") and STATE not in key and key not in frozen]
    moments = [
        f"critic {STATE}.{name}.{key.removeprefix('critic ')}" for key in frozen for name in ("exp_avg", "param")
    ]
    assert set(frozen) < saved.keys() and not set(moments) & saved.keys()
    assert all(f"critic {STATE}.exp_avg.{key.removeprefix('critic ')}" in saved for key in trained_ones)
    num_trained = sum(saved[key].numel() for key in trained_ones)
    assert num_trained <= with_gradients < num_trained + sum(saved[key].numel() for key in frozen)
    run_distributed_test(save_frozen, 4, first, second.parent, ParallelConfig(tp=2, pp=2), freeze_attention)
    assert_equal(content(second), saved)
    run_distributed_test(save_frozen, 2, second, third.parent, distributed(tp=2), lambda critic: None)
    thawed = content(third)
    assert_equal({key: thawed[key] for key in saved}, saved)
    for key in (name.removeprefix("critic ") for name in frozen):
        assert (
            not thawed[f"critic {STATE}.exp_avg.{key}"].any() and not thawed[f"critic {STATE}.exp_avg_sq.{key}"].any()
        )
        if dtype == "bfloat16":
            assert torch.equal(thawed[f"critic {STATE}.param.{key}"], saved[f"critic {key}"].float())


def test_no_rank_copies_or_writes_state_that_is_not_its_own(tmp_path: Path) -> None:
    hf = save_tiny_model(tmp_path / "hf")

    def body() -> int:
        actor, _ = start(hf, distributed(), "bfloat16")
        boxes = tensors_to_save(actor)
        storages = {tensor.untyped_storage().data_ptr() for tensor in actor.model.parameters()}
        for owned in owned_ranges(actor.optimizer):
            storages |= {tensor.untyped_storage().data_ptr() for tensor in owned.state.values()}
        assert all(box.data.untyped_storage().data_ptr() in storages for box in boxes.values())
        checkpoint_folder(tmp_path / "ck", hf).save(1, {"actor": actor}, {})
        files = (tmp_path / "ck" / "iter_0000001" / "actor").glob(f"__{actor.runtime.rank}_*")
        written = sum(file.stat().st_size for file in files)
        owned_bytes = sum(box.data.nbytes for box in boxes.values())
        assert owned_bytes < written < owned_bytes + 2000 * len(boxes)  # each box has a frame
        return owned_bytes

    sizes = run_distributed_test(body, 4)
    parameters = sum(tensor.numel() for key, tensor in weights_of(hf).items())
    assert sum(sizes) == 14 * parameters and max(sizes) <= 1.1 * min(sizes)


def weights_of(hf: Path) -> dict[str, Tensor]:
    def body() -> dict[str, Tensor]:
        actor, _ = start(hf, ParallelConfig())
        return {name: parameter.detach() for name, parameter in actor.model.named_parameters()}

    return run_distributed_test(body, 1)[0]


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_layers_above_a_frozen_embedding_are_trained(tmp_path: Path, recompute: Any) -> None:
    """What recomputes a layer's activations gives no gradients to a layer whose input needs none."""
    hf = save_tiny_model(tmp_path / "hf", num_hidden_layers=2)
    parallel = ParallelConfig(recompute=recompute)

    def prepare(critic: CriticModel) -> None:
        freeze(critic, frozen_names(critic.arch, ["model.embed_tokens.*"], "ppo.critic.frozen"))

    def body() -> set[str]:
        _, critic = start(hf, parallel, prepare=prepare)
        before = {name: p.detach().clone() for name, p in critic.model.named_parameters()}
        step(critic, parallel, 0)
        return {name for name, p in critic.model.named_parameters() if torch.equal(p, before[name])}

    assert run_distributed_test(body, 1)[0] == {"embedding.word_embeddings.weight"}
