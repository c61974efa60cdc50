"""The plan of a chain: what follows from layout, links and hardware, and what does not fit."""

import json
from pathlib import Path

import pytest

from megatron_vcppo.cli import main
from megatron_vcppo.config import Config
from megatron_vcppo.config.load import load_config
from megatron_vcppo.config.value_sources import CONFIGS
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.launch.chain_plan import StagePlan, experts_gb, plan_chain, rollouts_gb
from megatron_vcppo.launch.engine_estimate import cache_bytes, estimate_engines, generation_s, parameters_read, step_s
from megatron_vcppo.launch.push_estimate import LINK_SHARE, estimate_push

QWEN_32B = {
    "model_type": "qwen2",
    "torch_dtype": "bfloat16",
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "vocab_size": 152064,
    "max_position_embeddings": 131072,
}
RECIPE = CONFIGS / "recipes" / "vcppo_32b.yaml"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(QWEN_32B))
    return tmp_path


def load(model: Path, *overrides: str) -> tuple[Architecture, Config]:
    """The 32B recipe on 4 + 2 nodes of 8 GPUs, each GPU with a link of 400 Gbit/s."""
    given = [f"model.hf={model}", "run.dir=run", "sft.train=d", "prompts.train=d", "prompts.test=d"]
    given += ["cluster.rollout_nodes=2", "cluster.link_gb_per_s=400", *overrides]
    config = load_config(RECIPE, given, profiles=[CONFIGS / "cluster" / "example-h100.yaml"])
    return Architecture.from_hf(model), config


def plan_of(model: Path, stage: str, *overrides: str) -> StagePlan:
    arch, config = load(model, *overrides)
    return plan_chain(arch, config, [stage])[0]


def test_a_push_of_32b_over_400_gbit_takes_less_than_a_second(model: Path) -> None:
    arch, config = load(model)
    push = estimate_push(arch, config)
    assert push.senders == 8 and push.gb == pytest.approx(65.5, rel=0.01) and push.seconds < 1
    assert push.parts_s["senders' links"] == pytest.approx(65.5 / 400 / LINK_SHARE, rel=0.01)


def test_a_push_over_more_senders_takes_its_share(model: Path) -> None:
    def senders_s(count: int) -> float:
        return estimate_push(*load(model, f"weight_sync.max_senders={count}")).parts_s["senders' links"]

    assert senders_s(2) == pytest.approx(4 * senders_s(8)) and senders_s(1) == senders_s(2), "one per stage at least"
    nvlink = estimate_push(*load(model, "hardware.nvlink_gb_per_s=100"))
    assert nvlink.seconds == nvlink.parts_s["passing on within a node"] == pytest.approx(65.5 / 80, rel=0.01)
    slow = estimate_push(*load(model, "cluster.link_gb_per_s=40"))
    assert slow.seconds == pytest.approx(10 * estimate_push(*load(model)).parts_s["senders' links"])


def test_engines_have_room_for_what_the_weights_leave(model: Path) -> None:
    arch, config = load(model)
    found = estimate_engines(arch, config)
    weights_gib = arch.parameter_count() * 2 / 4 / 2**30
    assert found.engines == 4 and found.cache_gib == pytest.approx(0.9 * 80 - weights_gib - 2)
    assert cache_bytes(arch, config) == 2 * 64 * 2 * 128 * 2
    assert found.cache_tokens == int(found.cache_gib * 2**30 / cache_bytes(arch, config))
    assert found.concurrency == config.rollout.engine.max_num_seqs
    arch, config = load(model, "hardware.response_tokens=14336", "rollout.engine.max_num_seqs=1000")
    assert estimate_engines(arch, config).concurrency == int(found.cache_tokens / (256 + 14336 / 2))


def test_generation_is_bounded_by_memory_compute_and_the_fixed_part_of_a_step(model: Path) -> None:
    arch, config = load(model)
    base = generation_s(arch, config, 8192)
    for slower in ("hardware.memory_gb_per_s=1675", "hardware.memory_share=0.3"):
        assert base < generation_s(arch, load(model, slower)[1], 8192) < 2 * base
    longer = load(model, "hardware.prompt_tokens=2048", "hardware.mfu=0.2")[1]
    assert generation_s(arch, longer, 8192) > base
    short = load(model, "hardware.response_tokens=1024", "hardware.longest_tokens=1024")[1]
    tail = load(model, "hardware.response_tokens=1024")[1]
    alone = generation_s(arch, tail, 200) - generation_s(arch, short, 200)
    assert alone == pytest.approx((14336 - 1024) * step_s(arch, tail, 1)), "the longest response goes on alone"
    assert generation_s(arch, tail, 200, 14336) == generation_s(arch, tail, 200)
    limited = generation_s(arch, tail, 200) - generation_s(arch, tail, 200, 2048)
    assert limited == pytest.approx((14336 - 2048) * step_s(arch, tail, 1)), "nobody waits for more than a window"
    assert generation_s(arch, config, 8192, 7168) < 0.6 * base, "half of each response"
    fixed = load(model, "hardware.step_ms=1000")[1]
    steps = config.rollout.max_tokens * (8192 / 4) / 112
    assert generation_s(arch, fixed, 8192) - base == pytest.approx(steps * 0.995)
    assert generation_s(arch, config, 16384) == pytest.approx(2 * base)


def test_time_and_gpu_hours_follow_from_the_phases(model: Path) -> None:
    ppo = plan_of(model, "ppo")
    assert ppo.nodes == 6 and ppo.ranks == 32 and ppo.steps == 200
    assert set(ppo.phases_s) == {"push", "generation", "logprobs", "values", "update"}
    assert ppo.hours == pytest.approx(200 * sum(ppo.phases_s.values()) / 3600)
    assert ppo.phases_s["update"] == pytest.approx(8 * ppo.phases_s["logprobs"], rel=0.1), "two models, 3 + 1 passes"
    twice = plan_of(model, "ppo", "hardware.tflops=1978")
    assert twice.phases_s["update"] == pytest.approx(ppo.phases_s["update"] / 2)
    no_critic = plan_of(model, "ppo", "ppo.advantage.baseline=grpo", "rollout.num_samples=16",
                        "ppo.prompts_per_iteration=512")  # fmt: skip
    assert no_critic.phases_s["update"] == pytest.approx(ppo.phases_s["update"] / 2)
    assert no_critic.checkpoints_gb == pytest.approx(ppo.checkpoints_gb / 2)
    kept = "ppo.checkpoint.keep_best={metric: actor/entropy, count: 3}"
    more = plan_of(model, "ppo", kept, "ppo.checkpoint.keep_every=100")
    assert more.checkpoints_gb == pytest.approx(ppo.checkpoints_gb * (3 + 3 + 2) / 3), "3 best, and 2 of 200 iterations"
    overlapped = plan_of(model, "ppo", "ppo.staleness=1")
    assert overlapped.step_s < ppo.step_s
    saved = plan_of(model, "ppo", "ppo.checkpoint.async_save=false").phases_s["saving"]
    slow_disk = plan_of(model, "ppo", "ppo.checkpoint.async_save=false", "hardware.disk_gb_per_s=1")
    assert slow_disk.phases_s["saving"] == pytest.approx(5 * saved)


def test_evaluations_during_ppo_take_a_push_and_their_generation(model: Path, capsys) -> None:
    often = ("ppo.evaluate_every=30", "evaluate.num_samples=32")
    given = (*often, "evaluate.num_prompts=500")
    without, ppo = plan_of(model, "ppo"), plan_of(model, "ppo", *given)
    assert ppo.push is not None and ppo.hours is not None and without.hours is not None
    one = ppo.push.seconds + generation_s(*load(model), 500 * 32)
    assert 3600 * (ppo.hours - without.hours) == pytest.approx(6 * one), "200 iterations"
    assert plan_of(model, "ppo", *often).hours == without.hours
    arguments = ["plan", str(RECIPE), f"model.hf={model}", "--cluster", "example-h100", "cluster.rollout_nodes=2"]
    missing = "Those of ppo are without its evaluations: evaluate.num_prompts is not set"
    assert main([*arguments, *often]) == 0 and missing in capsys.readouterr().out
    assert main([*arguments, *given]) == 0 and missing not in capsys.readouterr().out


def test_a_push_to_engines_on_the_trainers_gpus_is_in_the_times(model: Path) -> None:
    shared = plan_of(model, "ppo", "cluster.rollout_nodes=0", "cluster.engines_on=trainer_gpus")
    assert shared.push is not None and shared.phases_s["push"] == shared.push.seconds > 0


def test_adapters_let_one_node_train_32b(model: Path) -> None:
    """What takes 73 GiB on each of 16 GPUs takes 17 on each of 8: docs/slurm.md has these figures."""
    lora = ("parallel.pp=1", "model.lora={rank: 32, alpha: 64.0}", "cluster.trainer_nodes=1")
    adapted = plan_of(model, "ppo", *lora)
    assert adapted.fits and sum(adapted.memory_gib.values()) < 18
    assert not plan_of(model, "ppo", "parallel.pp=1", "cluster.trainer_nodes=1").fits
    full = plan_of(model, "ppo", "cluster.trainer_nodes=2")
    assert full.fits and sum(full.memory_gib.values()) > 70
    assert adapted.checkpoints_gb < full.checkpoints_gb / 100
    same_nodes = plan_of(model, "ppo", "model.lora.rank=32", "cluster.trainer_nodes=2")
    assert same_nodes.phases_s["update"] == pytest.approx(full.phases_s["update"] * 3 / 4), "no gradients of the base"
    assert same_nodes.phases_s["values"] == full.phases_s["values"]


def test_stages_hold_only_the_nodes_that_they_use(model: Path) -> None:
    assert [plan_of(model, stage).nodes for stage in ("sft", "ppo", "export")] == [4, 6, 1]
    own = plan_of(model, "sft", "overrides.sft.cluster.trainer_nodes=2")
    assert (own.nodes, own.ranks) == (2, 16)


def test_what_does_not_fit_names_the_nearest_layout_that_does(model: Path) -> None:
    tight = plan_of(model, "ppo", "parallel.recompute=none", "parallel.pp=1")
    assert not tight.fits and tight.better == ("parallel.recompute=full",)
    again = plan_of(model, "ppo", "parallel.pp=1", *tight.better)
    assert again.fits and again.better == ()
    hopeless = plan_of(model, "ppo", "cluster.gpu_memory_gib=20")
    assert not hopeless.fits and hopeless.better == ()
    crowded = plan_of(model, "ppo", "rollout.engine.tp=1", "rollout.engine.per_node=8", "cluster.gpu_memory_gib=64")
    assert not crowded.fits and crowded.engines is not None and crowded.engines.concurrency == 0


def test_the_command_prints_the_plan_and_says_by_its_exit_code_whether_it_fits(model: Path, capsys) -> None:
    given = [str(RECIPE), f"model.hf={model}", "--cluster", "example-h100", "cluster.rollout_nodes=2"]
    assert main(["plan", *given]) == 0
    text = capsys.readouterr().out
    assert "65.5 GB by 8 senders" in text and "0.20 s" in text and "GPU-hours" in text
    assert "without sft (sft.steps is not set), evaluate (evaluate.num_prompts is not set)" in text
    assert "Times are for responses of 14,336 tokens (hardware.response_tokens)" in text
    assert main(["plan", *given, "--json"]) == 0
    stages = {stage["stage"]: stage for stage in json.loads(capsys.readouterr().out)["stages"]}
    assert stages["ppo"]["push"]["seconds"] < 1 and stages["ppo"]["gpu_hours"] > 0 and stages["sft"]["steps"] is None
    assert stages["export"]["gpu_hours"] == 0 and stages["export"]["hours"] > 0
    assert main(["plan", *given, "parallel.recompute=none", "parallel.pp=1"]) == 1
    assert "ppo does not fit: the nearest layout that does: parallel.recompute=full" in capsys.readouterr().out


def test_what_this_kind_of_model_has_not_is_refused_as_by_submit(model: Path, capsys) -> None:
    given = ["plan", str(RECIPE), f"model.hf={model}", "--cluster", "example-h100", "cluster.rollout_nodes=2"]
    assert main([*given, "ppo.routing_replay=true"]) == 2
    assert "ppo.routing_replay is for mixtures of experts" in capsys.readouterr().err


def test_without_gpus_a_gpus_figures_are_warned_of(model: Path, capsys) -> None:
    given = ["plan", str(CONFIGS / "demo" / "vcppo.yaml"), f"model.hf={model}"]
    assert main(given) == 0
    assert "hardware are a GPU's: the times are far too short" in capsys.readouterr().err
    assert main([*given, "hardware.tflops=0.013", "hardware.mfu=1"]) == 0
    assert not capsys.readouterr().err


QWEN3_30B_A3B = {
    "model_type": "qwen3_moe",
    "torch_dtype": "bfloat16",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
}


@pytest.fixture
def mixture(tmp_path: Path) -> tuple[Architecture, Config]:
    """Qwen3-30B-A3B with its shipped configuration, under the 32B recipe on 4 + 4 nodes."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B_A3B))
    own = tmp_path / "own.yaml"
    own.write_text("defaults: [recipes/vcppo_32b, models/qwen3-30b-a3b]\n")
    given = [f"model.hf={tmp_path}", "run.dir=run", "sft.train=d", "prompts.train=d", "prompts.test=d"]
    config = load_config(own, given, profiles=[CONFIGS / "cluster" / "example-h100.yaml"])
    return Architecture.from_hf(tmp_path), config


def test_a_mixture_is_planned_by_what_ranks_hold_and_tokens_pass_through(mixture: tuple[Architecture, Config]) -> None:
    arch, config = mixture
    assert arch.parameter_count() / 1e9 == pytest.approx(30.5, abs=0.05)
    assert arch.active_parameter_count() / 1e9 == pytest.approx(3.35, abs=0.05)
    stages = plan_chain(arch, config, list(config.stages))
    assert all(stage.fits for stage in stages)
    dense = arch.parameter_count() - arch.expert_parameter_count()
    ppo = next(stage for stage in stages if stage.stage == "ppo")
    held = 2 * (arch.expert_parameter_count() / 2 / 8 + dense / 2 / 4)  # actor and critic, pp 2, ep 8 or tp 4
    assert ppo.memory_gib["weights"] == pytest.approx(2 * held / 2**30, rel=0.1)
    per_token = arch.training_flops([1]) / 6
    assert per_token == pytest.approx(arch.active_parameter_count() - arch.vocab_size * arch.hidden_size, rel=0.01)
    assert ppo.push is not None and ppo.push.parts_s["gather over ep"] > 0


def test_routing_replay_takes_disk_until_checkpoints_are_past_it(mixture: tuple[Architecture, Config]) -> None:
    arch, config = mixture
    ppo = config.ppo
    ppo.iterations, ppo.prompts_per_iteration, config.rollout.num_samples, config.rollout.max_tokens = 100, 10, 2, 1000
    ppo.checkpoint.save_every, ppo.checkpoint.keep_last = 5, 2
    config.hardware.prompt_tokens, config.hardware.response_tokens = 200, 800
    assert experts_gb(arch, config) == 0
    ppo.routing_replay = True
    per_iteration = 20 * 1000 * 48 * 8 / 1e9
    assert experts_gb(arch, config) == pytest.approx(15 * per_iteration)
    ppo.checkpoint.keep_last = 0
    assert experts_gb(arch, config) == pytest.approx(100 * per_iteration)
    without = rollouts_gb(config, "ppo")
    assert plan_chain(arch, config, ["ppo"])[0].rollouts_gb == pytest.approx(without + 100 * per_iteration)


def test_an_engine_reads_the_experts_that_are_chosen(mixture: tuple[Architecture, Config]) -> None:
    arch, _ = mixture
    assert parameters_read(arch, 1) == pytest.approx(arch.active_parameter_count())
    assert parameters_read(arch, 256) == pytest.approx(arch.parameter_count(), rel=1e-4)


def test_the_nearest_layout_of_a_mixture_may_divide_its_experts(mixture: tuple[Architecture, Config]) -> None:
    arch, config = mixture
    config.parallel.ep = 1
    plan = plan_chain(arch, config, ["ppo"])[0]
    assert not plan.fits and plan.better == ("parallel.ep=4",)
