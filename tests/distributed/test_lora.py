"""Adapters equal PEFT's on the same model, and themselves under every layout; the base is held once and never moves."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_vcppo.config import LoraConfig, ModelConfig, ParallelConfig
from megatron_vcppo.data.packing import pack_all, rounding, unpack_all
from megatron_vcppo.errors import UserError
from megatron_vcppo.hf.adapters import LINEARS, adapter_shapes, check_model
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.mcore.hf_weights_io import stream_hf
from megatron_vcppo.mcore.learner import AdapterReference
from megatron_vcppo.mcore.model import build_actor
from megatron_vcppo.mcore.offload import HostMemory, gradients, optimizer_state, weights
from megatron_vcppo.mcore.starting_weights import load_from_hf
from tests.helpers.distributed import run_distributed_test
from tests.helpers.lora import ALPHA, LORA, RANK, fill, parts_of, start_with_adapters, whole
from tests.helpers.training import make_sequences, step
from tools.benchmarks._tiny_models import save_tiny_model

LAYOUTS = {
    "1": ParallelConfig(),
    "tp2": ParallelConfig(tp=2, dp=1),
    "tp2-sequence-parallel-recompute": ParallelConfig(tp=2, dp=1, sequence_parallel=True, recompute="full"),
    "pp2-recompute": ParallelConfig(pp=2, dp=1, recompute="full"),
    "dp2-distributed-optimizer-overlap": ParallelConfig(dp=2, distributed_optimizer=True, overlap=True),
    "cp2": ParallelConfig(cp=2, dp=1),
}


def num_ranks(parallel: ParallelConfig) -> int:
    return parallel.tp * parallel.pp * parallel.cp * (parallel.dp or 1)


def peft_model(hf: Path, matrices: dict[str, torch.Tensor], lora: LoraConfig = LORA) -> Any:
    """PEFT's model with the same matrices."""
    base = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    assert lora.rank is not None
    settings = peft.LoraConfig(r=lora.rank, lora_alpha=int(lora.alpha), target_modules=[*lora.targets])
    model: Any = peft.get_peft_model(base, settings)
    shapes = adapter_shapes(Architecture.from_hf(hf))
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in matrices.items():
            layer, module, matrix = name.split(".")
            path = f"base_model.model.model.layers.{layer}.{shapes[module].hf_module}.{matrix}.default.weight"
            parameters[path].copy_(value)
    trained = [name for name, parameter in parameters.items() if parameter.requires_grad]
    assert len(trained) == len(matrices), "PEFT trains the same matrices"
    return model


def compute(hf: Path, parallel: ParallelConfig, lora: LoraConfig) -> dict:
    """Log-probs of a batch, then one step on it: gradients before clipping."""
    actor, _ = start_with_adapters(hf, parallel, lora, clip_grad=0.0)
    fill(actor.model)
    values = parts_of(actor.model)
    microbatches = pack_all(make_sequences(0), 160, *rounding(parallel))
    rows = unpack_all(microbatches, actor.logprobs(microbatches))
    merged = {name: tensor.clone() for name, tensor in stream_hf(actor.model)}
    step(actor, parallel, 0)
    return {"values": values, "rows": rows, "merged": merged, "gradients": parts_of(actor.model, gradients=True)}


@pytest.mark.parametrize(
    ("family", "layout", "targets"),
    [
        ("qwen2", {}, LORA.targets),
        ("qwen3", {"tp": 2, "sequence_parallel": True}, LORA.targets),
        ("llama", {"pp": 2}, ["q_proj", "v_proj", "up_proj"]),
        ("gemma3_text", {}, ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]),
        ("olmo2", {"tp": 2}, ["q_proj", "up_proj"]),
        ("qwen2", {"tp": 2}, ["k_proj", "o_proj", "gate_proj", "down_proj"]),
    ],
)
def test_logits_and_gradients_equal_peft(tmp_path: Path, family: str, layout: dict, targets: list) -> None:
    hf = save_tiny_model(tmp_path / "hf", family)
    parallel, lora = ParallelConfig(**layout), LoraConfig(RANK, ALPHA, targets)
    ranks = run_distributed_test(compute, num_ranks(parallel), hf, parallel, lora)
    values = whole([rank["values"] for rank in ranks], parallel)
    assert len(values) == 2 * 4 * len(targets)
    model = peft_model(hf, values, lora)

    sequences, losses, total = make_sequences(0), [], 0
    for row, sequence in zip(ranks[0]["rows"], sequences, strict=True):
        ids = torch.tensor([sequence.token_ids])
        logprobs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        assert (row[1:] - logprobs).abs().max() <= 1e-4
        losses.append(-logprobs[2:].sum())
        total += len(sequence) - 3
    (torch.stack(losses).sum() / total).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    shapes = adapter_shapes(Architecture.from_hf(hf))
    for name, gradient in whole([rank["gradients"] for rank in ranks], parallel).items():
        layer, module, matrix = name.split(".")
        path = f"base_model.model.model.layers.{layer}.{shapes[module].hf_module}.{matrix}.default.weight"
        wanted = expected[path]
        assert wanted is not None and wanted.abs().max() > 1e-4, "a gradient that is not there would be equal too"
        assert (gradient - wanted).abs().max() <= 1e-4, name

    merged = {name: tensor for rank in ranks for name, tensor in rank["merged"].items()}
    for name, tensor in model.merge_and_unload().state_dict().items():
        assert (merged[name] - tensor).abs().max() <= 1e-6, f"{name}: what is pushed to the engines"


def train(hf: Path, parallel: ParallelConfig) -> dict:
    """Three steps of actor and critic: losses and gradient norms; the adapters then; whether the base moved."""
    actor, critic = start_with_adapters(hf, parallel)
    base = {name: p.clone() for name, p in actor.model.named_parameters() if not actor.model.is_stored(name)}
    initial = parts_of(actor.model)
    reference = AdapterReference(actor)
    microbatches = pack_all(make_sequences(99), 160, *rounding(parallel))
    before = torch.cat(actor.logprobs(microbatches))
    history = [step(learner, parallel, seed) for seed in range(3) for learner in (actor, critic)]
    parameters = dict(actor.model.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in base.items()), "the base moved"
    after = torch.cat(actor.logprobs(microbatches))
    assert (after - before).abs().max() > 1e-3
    assert torch.equal(torch.cat(reference.logprobs(microbatches)), before), "the reference is the start"
    assert torch.equal(torch.cat(actor.logprobs(microbatches)), after), "and leaves the actor as it is"
    return {"history": history, "initial": initial, "final": parts_of(actor.model)}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    hf = save_tiny_model(tmp_path_factory.mktemp("hf"), tied=True)
    return hf, run_distributed_test(train, 1, hf, ParallelConfig())[0]


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "1"])
def test_training_is_the_same_under_every_layout(reference: tuple[Path, dict], name: str) -> None:
    hf, expected = reference
    parallel = LAYOUTS[name]
    ranks = run_distributed_test(train, num_ranks(parallel), hf, parallel)
    for rank in ranks:
        for ours, theirs in zip(rank["history"], expected["history"], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5)
    for moment, limit in (("initial", 0.0), ("final", 1e-4)):  # AdamW's division magnifies float32 noise
        ours, theirs = whole([rank[moment] for rank in ranks], parallel), whole([expected[moment]], ParallelConfig())
        assert ours.keys() == theirs.keys() and len(ours) == 2 * 4 * 7
        assert max((ours[key] - theirs[key]).abs().max() for key in theirs) <= limit, moment


def test_new_adapters_start_as_pefts(reference: tuple[Path, dict]) -> None:
    """A uniform within 1 / sqrt(inputs), B zero; no two matrices alike."""
    initial = whole([reference[1]["initial"]], ParallelConfig())
    for name, value in initial.items():
        bound = value.shape[1] ** -0.5
        if name.endswith("lora_B"):
            assert not value.any()
        else:
            assert 0.9 * bound < value.abs().max() <= bound
            assert value.std() == pytest.approx(bound / 3**0.5, rel=0.15)
    firsts = {float(value[0, 0]) for name, value in initial.items() if name.endswith("lora_A")}
    assert len(firsts) == 4 * 7


@pytest.mark.parametrize("layout", [{}, {"dp": 2, "distributed_optimizer": True}], ids=["plain", "distributed"])
def test_actor_and_critic_hold_the_base_once(tmp_path: Path, layout: dict) -> None:
    hf = save_tiny_model(tmp_path / "hf")
    parallel = ParallelConfig(**layout)

    def body() -> dict[str, int]:
        actor, critic = start_with_adapters(hf, parallel, dtype="bfloat16")
        models = (actor.model, critic.model)
        base = [{p.data_ptr() for n, p in m.named_parameters() if not m.is_stored(n)} for m in models]
        assert base[1] < base[0] and len(base[0] - base[1]) == 1, "the actor alone has an output layer"
        storages = {s._cdata: s.nbytes() for model in models for s in weights(model)}
        trained = sum(p.numel() for model in models for p in model.parameters() if p.requires_grad)
        return {
            "weights": sum(storages.values()),
            "base": sum(p.numel() for n, p in models[0].named_parameters() if not models[0].is_stored(n)),
            "trained": trained,
            "gradients": sum(s.nbytes() for learner in (actor, critic) for s in gradients(learner.ddp)),
            "optimizer": sum(
                s.nbytes() for learner in (actor, critic) for s in optimizer_state(learner.optimizer, learner.model)
            ),
        }

    held = run_distributed_test(body, parallel.dp or 1)[0]
    sharing = parallel.dp or 1
    slack = 4096  # padding of Megatron's buffers, float32 heads
    assert 2 * held["base"] <= held["weights"] <= 2 * (held["base"] + held["trained"]) + slack
    assert held["gradients"] <= 4 * held["trained"] + slack
    assert held["optimizer"] <= 12 * held["trained"] / sharing + slack
    assert held["trained"] < held["base"] / 2


def test_an_actor_takes_a_critics_base_and_loads_what_that_lacks(tmp_path: Path) -> None:
    """As in value pretraining, where the actor that generates comes after the critic in training."""
    hf = save_tiny_model(tmp_path / "hf")

    def body() -> tuple[int, bool]:
        _, critic = start_with_adapters(hf, ParallelConfig())
        config = ModelConfig(hf=str(hf), dtype="float32", lora=LORA)
        actor = build_actor(critic.model.arch, config, ParallelConfig())
        load_from_hf(actor, hf, owner=critic.model)
        own = {p.data_ptr() for n, p in actor.named_parameters() if not actor.is_stored(n)}
        lacking = own - {p.data_ptr() for p in critic.model.parameters()}
        stored = load_file(hf / "model.safetensors")
        return len(lacking), all(torch.equal(tensor, stored[name]) for name, tensor in stream_hf(actor))

    assert run_distributed_test(body, 1)[0] == (1, True)


def test_a_shared_base_leaves_the_device_once(tmp_path: Path) -> None:
    hf = save_tiny_model(tmp_path / "hf")

    def body() -> None:
        actor, critic = start_with_adapters(hf, ParallelConfig())
        microbatches = pack_all(make_sequences(0), 160, *rounding(ParallelConfig()))
        before = torch.cat(actor.logprobs(microbatches)), torch.cat(critic.values(microbatches))
        held = [*weights(actor.model), *weights(critic.model)]
        once = sum(storage.nbytes() for storage in {storage._cdata: storage for storage in held}.values())
        host = HostMemory()
        assert host.take(held) == once
        assert len(host.parked) < len(held) and host.take(held) == 0
        with pytest.raises(RuntimeError, match="weights of the model are in host memory"):
            critic.values(microbatches)
        assert host.give_back() == once
        assert torch.equal(torch.cat(actor.logprobs(microbatches)), before[0])
        assert torch.equal(torch.cat(critic.values(microbatches)), before[1])

    run_distributed_test(body, 1)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("qwen3_moe", "mixtures of experts take no adapters"),
        ("olmo2", "o_proj and down_proj of olmo2 are"),
    ],
)
def test_models_that_take_no_adapters_are_refused(tmp_path: Path, family: str, message: str) -> None:
    arch = Architecture.from_hf(save_tiny_model(tmp_path / "hf", family))
    with pytest.raises(UserError, match=message):
        check_model(arch, LORA)
    check_model(arch, LoraConfig())


def test_every_target_is_in_a_linear_layer() -> None:
    assert sorted(name for names in LINEARS.values() for name in names) == sorted(LORA.targets)
