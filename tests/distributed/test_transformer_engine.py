"""Transformer Engine's own Python (over tests/helpers/te) against our layers and torch's AdamW, on CPU."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_vcppo.config import ParallelConfig
from megatron_vcppo.hf.convert.exporter import export_hf
from megatron_vcppo.hf.convert.importer import import_hf
from tests.helpers.distributed import run_distributed_test
from tests.helpers.lora import LORA
from tests.helpers.te.process import Call
from tests.helpers.te.scenarios import (
    Case,
    added_in_place,
    attention_warnings,
    error_of_building,
    error_of_loading,
    fp8_config,
    fp8_run,
    fp8_step_of_unequal_replicas,
    outputs_and_gradients,
    train,
    weights_on_a_component,
)
from tools.benchmarks._tiny_models import YARN, save_tiny_model

TE = {"layers": "transformer_engine"}
SIDES = {"torch": {"layers": "torch"}, "te": TE}


BASIC = ("qwen2", "qwen3", "qwen3_moe", "llama")


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], limit: float) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        worst = float((ours[name] - theirs[name]).abs().max())
        assert worst <= limit, f"{name} differs by {worst:.1e}"


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        *itertools.product(
            ({"family": family, "tied": tied} for family in BASIC for tied in (False, True)),
            ("actor", "critic"),
        ),
        ({"family": "mistral"}, "actor"),
        ({"family": "olmo2"}, "actor"),
        ({"family": "gemma3_text", "tied": True}, "actor"),
        ({"family": "qwen2", "rope_parameters": YARN}, "actor"),
    ],
    ids=str,
)
def test_outputs_and_gradients_equal_own_layers(
    te_ranks: Call, tmp_path: Path, model: dict[str, Any], kind: Any
) -> None:
    case = Case(save_tiny_model(tmp_path / "hf", num_hidden_layers=2, **model), SIDES["torch"], kind=kind)
    ours = run_distributed_test(outputs_and_gradients, 1, case)[0]
    theirs = te_ranks(outputs_and_gradients, 1, replace(case, model=TE))[0]
    assert len(ours) > 15
    assert_close(ours, theirs, 1e-5)


@pytest.mark.parametrize(
    ("family", "layout"),
    [("qwen2", {}), ("qwen3", {"tp": 2, "sequence_parallel": True, "recompute": "full"})],
    ids=["one-rank", "tp2-sequence-parallel-recompute"],
)
def test_adapters_equal_those_on_own_layers(te_ranks: Call, tmp_path: Path, family: str, layout: dict) -> None:
    parallel = ParallelConfig(**layout)
    hf = save_tiny_model(tmp_path / "hf", family, num_hidden_layers=2)
    case = Case(hf, {**SIDES["torch"], "lora": LORA}, parallel)
    ours = run_distributed_test(outputs_and_gradients, parallel.tp, case)
    theirs = te_ranks(outputs_and_gradients, parallel.tp, replace(case, model={**TE, "lora": LORA}))
    for own, other in zip(ours, theirs, strict=True):
        assert len(own) == 2 + 2 * 2 * 7 and min(float(value.abs().max()) for value in own.values()) > 1e-6
        assert_close(own, other, 1e-5)


def test_a_component_is_the_base_of_adapters(te_ranks: Call, tmp_path: Path) -> None:
    """Norms lie elsewhere in layers with adapters, but not in checkpoints."""
    hf = save_tiny_model(tmp_path / "hf", num_hidden_layers=2)
    import_hf(hf, tmp_path / "component", 1, 1)
    pushed = te_ranks(weights_on_a_component, 1, Case(hf, {**TE, "lora": LORA}), tmp_path / "component")[0]
    stored = load_file(hf / "model.safetensors")
    assert pushed.keys() == stored.keys() and all(torch.equal(pushed[name], stored[name]) for name in stored)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputed_gradients_are_equal(te_ranks: Call, tmp_path: Path, recompute: Any) -> None:
    case = Case(save_tiny_model(tmp_path / "hf", "qwen3", num_hidden_layers=2), TE)
    kept = te_ranks(outputs_and_gradients, 1, case)[0]
    again = te_ranks(outputs_and_gradients, 1, replace(case, parallel=ParallelConfig(recompute=recompute)))[0]
    assert_close(kept, again, 1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("distributed", [False, True], ids=["plain", "distributed-optimizer"])
@pytest.mark.parametrize(("before", "after"), [("te", "te"), ("torch", "te"), ("te", "torch")])
def test_training_continues_across_layers_and_optimizers(
    te_ranks: Call, tmp_path: Path, before: str, after: str, distributed: bool, dtype: str
) -> None:
    """Saved with one optimizer, resumed with the other: the state is equal, and so is what comes of it."""
    run = {"torch": run_distributed_test, "te": te_ranks}
    hf = save_tiny_model(tmp_path / "hf", "qwen3", num_hidden_layers=2)
    parallel = ParallelConfig(distributed_optimizer=distributed)
    # A critic has a float32 head, also in bfloat16.
    first, second = (Case(hf, {**SIDES[side], "dtype": dtype}, parallel, "critic") for side in (before, after))
    through = run[before](train, 1, first, tmp_path / "ck", range(4), save_at=2)[0]
    resumed = run[after](train, 1, second, tmp_path / "ck", range(2, 4))[0]
    assert "transformer_engine" in run["te"](train, 1, second, tmp_path / "none", range(0))[0]["optimizer"]
    assert through["saved"]["steps"] == resumed["loaded"]["steps"] == 2
    assert_close(through["saved"], resumed["loaded"], 0.0)
    for (loss, norm), (expected_loss, expected_norm) in zip(resumed["history"], through["history"][2:], strict=True):
        limit = 1e-6 if dtype == "float32" else 2e-2  # other kernels round bfloat16 in other places
        assert loss == pytest.approx(expected_loss, rel=limit) and norm == pytest.approx(expected_norm, rel=10 * limit)
    if before == after:
        assert resumed["history"] == through["history"][2:], "the same optimizer must continue bit-equal"


@pytest.mark.parametrize(("before", "after"), [("torch", "te"), ("te", "torch")])
def test_a_mixture_continues_across_layers(te_ranks: Call, tmp_path: Path, before: str, after: str) -> None:
    """Experts in one grouped product and one by one are stored alike; a dense layer is among the layers."""
    run = {"torch": run_distributed_test, "te": te_ranks}
    hf = save_tiny_model(tmp_path / "hf", "qwen3_moe", num_hidden_layers=2, mlp_only_layers=[0])
    first, second = (Case(hf, SIDES[side], ParallelConfig(distributed_optimizer=True)) for side in (before, after))
    through = run[before](train, 1, first, tmp_path / "ck", range(2), save_at=1)[0]
    resumed = run[after](train, 1, second, tmp_path / "ck", range(1, 2))[0]
    assert_close(through["saved"], resumed["loaded"], 0.0)
    assert resumed["history"][0] == pytest.approx(through["history"][1], rel=1e-5)


LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2-sequence-parallel": {"tp": 2, "sequence_parallel": True, "recompute": "full"},
    "pp2": {"pp": 2},
    "dp2-overlap": {"distributed_optimizer": True, "overlap": True},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_training_is_the_same_under_every_layout(te_ranks: Call, tmp_path: Path, layout: dict[str, Any]) -> None:
    """Over gloo: Transformer Engine's own collectives, and its attributes of parameters as Megatron reads them."""
    case = Case(save_tiny_model(tmp_path / "hf", "qwen3", num_hidden_layers=2), TE)
    expected = te_ranks(train, 1, case, tmp_path / "a", range(3))[0]["history"]
    for found in te_ranks(train, 2, replace(case, parallel=ParallelConfig(**layout)), tmp_path / "b", range(3)):
        for ours, theirs in zip(found["history"], expected, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5)


def test_a_frozen_critic_trains_like_with_own_layers(te_ranks: Call, tmp_path: Path) -> None:
    """Also with gradients that are reduced during the backward pass; only what is trained moves."""
    hf = save_tiny_model(tmp_path / "hf", "qwen3", num_hidden_layers=2)
    case = Case(hf, SIDES["torch"], kind="critic", frozen=("*.self_attn.*",))
    ours = run_distributed_test(train, 1, case, tmp_path / "torch", range(3))[0]
    parallel = ParallelConfig(distributed_optimizer=True, overlap=True)
    for found in te_ranks(train, 2, replace(case, model=TE, parallel=parallel), tmp_path / "te", range(3)):
        for loss_and_norm, expected in zip(found["history"], ours["history"], strict=True):
            assert loss_and_norm == pytest.approx(expected, abs=1e-5)
        assert_close(found["weights"], ours["weights"], 1e-4)
        before = load_file(hf / "model.safetensors")
        moved = {name for name, weight in found["weights"].items() if not torch.equal(weight, before[name])}
        assert moved == {name for name in found["weights"] if ".self_attn." not in name}


def test_gradients_are_added_in_the_matrix_product(te_ranks: Call, tmp_path: Path) -> None:
    case = Case(save_tiny_model(tmp_path / "hf", num_hidden_layers=2), TE)
    in_place = te_ranks(added_in_place, 1, case)[0]
    layers = {name for name, done in in_place.items() if done}
    assert layers == {name for name in in_place if "linear" in name and name.endswith(".weight")} and len(layers) == 8
    assert not any(run_distributed_test(added_in_place, 1, replace(case, model=SIDES["torch"]))[0].values())


@pytest.mark.parametrize("distributed", [False, True], ids=["plain", "distributed-optimizer"])
def test_a_checkpoint_from_before_the_first_step_loads(te_ranks: Call, tmp_path: Path, distributed: bool) -> None:
    parallel = ParallelConfig(distributed_optimizer=distributed)
    case = Case(save_tiny_model(tmp_path / "hf", num_hidden_layers=2), TE, parallel)
    through = te_ranks(train, 1, case, tmp_path / "ck", range(2), save_at=0)[0]
    assert (
        te_ranks(train, 1, replace(case), tmp_path / "ck", range(0, 2), resume=True)[0]["history"] == through["history"]
    )


def test_stream_and_export_are_the_trained_weights(te_ranks: Call, tmp_path: Path) -> None:
    hf = save_tiny_model(tmp_path / "hf", "qwen3", num_hidden_layers=2)
    trained = te_ranks(train, 1, Case(hf, TE), tmp_path / "ck", range(1), save_at=1)[0]["weights"]
    export_hf(tmp_path / "ck" / "iter_0000001", tmp_path / "out", verify_logits=False)
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert trained.keys() == exported.keys() == load_file(hf / "model.safetensors").keys()
    assert_close(trained, exported, 0.0)
    assert not torch.equal(exported["model.norm.weight"], load_file(hf / "model.safetensors")["model.norm.weight"])


@pytest.mark.parametrize("recipe", ["delayed", "current"])
def test_fp8_trains_close_to_bfloat16_and_resumes(te_ranks: Call, tmp_path: Path, recipe: str) -> None:
    """Weights' 8-bit copies are made again after a step; checkpoints hold none of it."""
    case = Case(save_tiny_model(tmp_path / "hf", num_hidden_layers=2), {**TE, "dtype": "bfloat16"})
    plain = te_ranks(fp8_run, 1, case, tmp_path / "plain")[0]
    model = {**case.model, "fp8": "hybrid", "fp8_recipe": recipe}
    found = te_ranks(fp8_run, 1, replace(case, model=model), tmp_path / "fp8")[0]
    assert plain["quantized"] == 0 and found["quantized"] == 8, "the four products of two layers"
    assert found["config"] == {
        "fp8": "hybrid",
        "fp8_recipe": {"current": "tensorwise"}.get(recipe, recipe),
        "fp8_param": False,
        "fp8_amax_history_len": 1024 if recipe == "delayed" else 1,
    }
    assert found["dtypes"] == {"torch.bfloat16"} and found["keys"] == plain["keys"]
    assert not any(length % 16 for length in found["lengths"]) and any(length % 16 for length in plain["lengths"])
    assert found["copies"] == [8, 0] and plain["copies"] == [0, 0], "engines on the same GPU need their memory"
    assert torch.equal(found["without copies"], found["logprobs"][-1])
    assert found["losses"] == pytest.approx(plain["losses"], rel=0.02)
    assert len({float(x.sum()) for x in found["logprobs"]}) == 4, "every step must show in the next pass"
    differences = (found["resumed"] - found["again"]).abs()
    # "delayed" starts its history again with a resume: other scales, so another rounding.
    assert differences.max() == 0 if recipe == "current" else 0 < differences.mean() < 0.1


def test_fp8_below_adapters(te_ranks: Call, tmp_path: Path) -> None:
    """The base's products are in 8 bits, the adapters' are not."""
    case = Case(save_tiny_model(tmp_path / "hf", num_hidden_layers=2), {**TE, "dtype": "bfloat16", "lora": LORA})
    plain, found = (
        te_ranks(fp8_run, 1, replace(case, model={**case.model, "fp8": fp8}), tmp_path / fp8)[0]
        for fp8 in ("off", "hybrid")
    )
    assert plain["quantized"] == 0 and found["quantized"] == 8
    assert found["losses"] == pytest.approx(plain["losses"], rel=0.02)
    assert len({float(x.sum()) for x in found["logprobs"]}) == 4, "every step must show in the next pass"


def test_fp8_with_delayed_scales_takes_replicas_with_different_numbers_of_microbatches(
    te_ranks: Call, tmp_path: Path
) -> None:
    """Scales are shared by the ranks of a replica only: others would wait for each other's micro-batches."""
    model = {**TE, "dtype": "bfloat16", "fp8": "hybrid", "fp8_recipe": "delayed"}
    case = Case(save_tiny_model(tmp_path / "hf", num_hidden_layers=2), model)
    (longer, applied), (shorter, also) = te_ranks(fp8_step_of_unequal_replicas, 2, case)
    assert longer > shorter == 1 and applied and also


def test_fp8_with_blocks_pads_to_their_size(te_ranks: Call, tmp_path: Path) -> None:
    model = {**TE, "dtype": "bfloat16", "fp8": "hybrid", "fp8_recipe": "blockwise"}
    case = Case(save_tiny_model(tmp_path / "hf", num_hidden_layers=2), model)
    (config,) = te_ranks(fp8_config, 1, case)
    assert config == {"fp8": "hybrid", "fp8_recipe": "blockwise", "lengths": [0] * len(config["lengths"])}


def test_unfused_attention_is_reported_unless_float32_has_no_other(te_ranks: Call, tmp_path: Path) -> None:
    hf = save_tiny_model(tmp_path / "hf", num_hidden_layers=2)
    (slow,) = te_ranks(attention_warnings, 1, Case(hf, {**TE, "dtype": "bfloat16"}), False)
    assert slow[0] is None and "neither fused nor flash attention" in slow[1]
    for dtype in ("bfloat16", "float32"):
        assert te_ranks(attention_warnings, 1, Case(hf, {**TE, "dtype": dtype}), True) == [[None, None]]


@pytest.mark.parametrize("kind", ["actor", "critic"])
def test_a_weight_that_a_checkpoint_lacks_is_an_error(te_ranks: Call, tmp_path: Path, kind: Any) -> None:
    """Only the modules' extra state may be missing."""
    case = Case(save_tiny_model(tmp_path / "hf", num_hidden_layers=2), TE, kind=kind)
    (error,) = te_ranks(error_of_loading, 1, case, tmp_path / "ck")
    assert 'Missing key(s) in state_dict: "decoder.layers.1.mlp.linear_fc2.weight"' in error
    assert "_extra_state" not in error


REFUSED: dict[str, tuple[str, dict[str, Any], ParallelConfig, str]] = {
    "cp-window": (
        "mistral",
        {"dtype": "bfloat16"},
        ParallelConfig(cp=2),
        "parallel.cp 2 with a sliding window: Transformer Engine's attention over several ranks has none; "
        "set parallel.cp=1 or model.layers=torch",
    ),
    "cp-float32": (
        "qwen2",
        {"dtype": "float32"},
        ParallelConfig(cp=2),
        "parallel.cp 2 with model.dtype float32: Transformer Engine has no attention over several ranks in float32; "
        "set model.dtype=bfloat16 or model.layers=torch",
    ),
    "fp8-widths": (
        "qwen2",
        {"dtype": "bfloat16", "fp8": "hybrid"},
        ParallelConfig(tp=4),
        "model.fp8 needs widths that are multiples of 16 on each rank, with tp 4 there are: feed-forward 24",
    ),
}


@pytest.mark.parametrize(("family", "model", "parallel", "message"), REFUSED.values(), ids=REFUSED)
def test_what_transformer_engine_cannot_do_is_refused(
    te_ranks: Call, tmp_path: Path, family: str, model: dict, parallel: ParallelConfig, message: str
) -> None:
    case = Case(save_tiny_model(tmp_path / "hf", family, num_key_value_heads=4), {**TE, **model}, parallel)
    assert te_ranks(error_of_building, 1, case) == [message]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"layers": "transformer_engine"}, "model.layers is transformer_engine, which cannot be imported here"),
        ({"dtype": "bfloat16", "fp8": "hybrid"}, "model.fp8 is hybrid, which needs Transformer Engine and a GPU"),
    ],
)
def test_without_transformer_engine_what_needs_it_is_refused(tmp_path: Path, model: dict, message: str) -> None:
    case = Case(save_tiny_model(tmp_path / "hf"), model)
    assert run_distributed_test(error_of_building, 1, case)[0].startswith(message)
