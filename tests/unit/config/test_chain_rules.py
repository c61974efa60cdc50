"""Settings of value pretraining, PPO and evaluation that do not fit each other are refused with the numbers."""

from typing import Any

import pytest
from omegaconf import OmegaConf

from megatron_vcppo.config import Config
from megatron_vcppo.config.load import load_config
from megatron_vcppo.config.validation import check_config
from megatron_vcppo.config.value_sources import CONFIGS
from megatron_vcppo.errors import UserError


def make_config(*stages: str, **sections: Any) -> Config:
    base = {
        "run": {"dir": "runs/x"},
        "model": {"hf": "models/x"},
        "sft": {"train": "x"},
        "prompts": {"train": "x"},
        "stages": list(stages) or ["sft", "ppo"],
        "ppo": {"critic": {"init": "sft"}},
    }
    merged = OmegaConf.merge(OmegaConf.structured(Config), base, sections)
    return OmegaConf.to_object(merged)  # type: ignore[return-value]


def test_sound_chains_pass() -> None:
    check_config(make_config())
    chain = ("sft", "reward_model", "value_pretrain", "ppo")
    check_config(make_config(*chain, ppo={"critic": {"init": "value_pretrain"}}))
    check_config(make_config("evaluate", prompts={"test": "x"}, evaluate={"num_samples": 8, "k": [1, 8]}))
    groups = {"advantage": {"baseline": "grpo"}, "critic": {"init": "value_pretrain"}, "dynamic_sampling": True}
    check_config(make_config(ppo=groups, rollout={"num_samples": 2}))


PROBLEMS: dict[str, tuple[dict[str, Any], str]] = {
    "samples of a baseline": (
        {"ppo": {"advantage": {"baseline": "rloo"}}},
        "ppo.advantage.baseline rloo needs rollout.num_samples > 1, got 1",
    ),
    "no critic to train alone": (
        {
            "ppo": {"advantage": {"baseline": "grpo"}, "critic_only_iterations": 3},
            "rollout": {"num_samples": 4},
        },
        "ppo.critic_only_iterations 3 needs a critic, but ppo.advantage.baseline grpo has none",
    ),
    "dynamic sampling": (
        {"ppo": {"dynamic_sampling": True}},
        "ppo.dynamic_sampling needs rollout.num_samples > 1, got 1",
    ),
    "staleness and dynamic sampling": (
        {"ppo": {"dynamic_sampling": True, "staleness": 1}, "rollout": {"num_samples": 2}},
        "ppo.staleness 1 cannot be combined with ppo.dynamic_sampling",
    ),
    "windows of groups": (
        {"ppo": {"window_tokens": 8, "advantage": {"baseline": "grpo"}}, "rollout": {"num_samples": 4}},
        "ppo.window_tokens 8 cannot be combined with ppo.advantage.baseline grpo, which compares whole groups",
    ),
    "windows and staleness": (
        {"ppo": {"window_tokens": 8, "staleness": 1}},
        "ppo.window_tokens 8 cannot be combined with ppo.staleness 1, which takes whole groups from a queue",
    ),
    "windows and the gate": (
        {"ppo": {"window_tokens": 8, "advantage": {"explained_variance_gate": True}}},
        "ppo.window_tokens 8 cannot be combined with ppo.advantage.explained_variance_gate True, which replaces",
    ),
    "windows and dynamic sampling": (
        {"ppo": {"window_tokens": 8, "dynamic_sampling": True}, "rollout": {"num_samples": 2}},
        "ppo.window_tokens 8 cannot be combined with ppo.dynamic_sampling True, which compares whole groups",
    ),
    "windows and a reward model": (
        {"ppo": {"window_tokens": 8}, "rewards": {"model": {"path": "x"}}},
        "ppo.window_tokens 8 cannot be combined with rewards.model.path x, which scores whole responses",
    ),
    "windows and stop texts": (
        {"ppo": {"window_tokens": 8}, "rollout": {"stop": ["END"]}},
        "ppo.window_tokens 8 cannot be combined with rollout.stop ['END'], which would miss a text",
    ),
    "windows and tools": (
        {"ppo": {"window_tokens": 8}, "prompts": {"tools": {"tool_sum": "calculator"}}},
        "ppo.window_tokens 8 cannot be combined with prompts.tools {'tool_sum': 'calculator'}, which calls tools",
    ),
    "partial rollouts that end at every push": (
        {"ppo": {"partial_rollouts": True, "staleness": 2}},
        "ppo.partial_rollouts needs ppo.staleness > 0 and weight_sync.pause keep, got 2 and drain",
    ),
    "partial rollouts without staleness": (
        {"ppo": {"partial_rollouts": True}, "weight_sync": {"pause": "keep"}},
        "ppo.partial_rollouts needs ppo.staleness > 0 and weight_sync.pause keep, got 0 and keep",
    ),
    "a limit on an error that nobody computes": (
        {"ppo": {"loss": {"kind": "dis", "max_logprob_error": 0.5}}},
        "ppo.loss.max_logprob_error 0.5 belongs to ppo.loss.kind clip",
    ),
    "minibatches": (
        {"ppo": {"minibatches": 9, "prompts_per_iteration": 4}, "rollout": {"num_samples": 2}},
        "ppo.minibatches 9 is more than the 8 rollouts of an iteration "
        "(ppo.prompts_per_iteration 4 × rollout.num_samples 2)",
    ),
    "bounds": (
        {"values": {"bounds": [1.0, -1.0]}},
        "values.bounds must be two increasing numbers [low, high]",
    ),
    "evaluation without problems": ({"ppo": {"evaluate_every": 5}}, "ppo.evaluate_every 5 needs held-out problems"),
    "pass@k": (
        {"ppo": {"evaluate_every": 5}, "prompts": {"test": "x"}, "evaluate": {"num_samples": 4, "k": [1, 8]}},
        "evaluate.k 8 is more than evaluate.num_samples 4",
    ),
    "no room for a prompt": (
        {"rollout": {"max_tokens": 512}, "model": {"max_length": 512}},
        "rollout.max_tokens 512 leaves no room for a prompt: it must be below model.max_length 512",
    ),
    "critic of no path": ({"ppo": {"critic": {"init": "checkpoint"}}}, "ppo.critic.checkpoint_path"),
    "adaptive KL": ({"ppo": {"loss": {"kl_target": 0.1}}}, "it needs ppo.loss.kl_coef > 0 (got 0)"),
    "two reward models": (
        {"rewards": {"model": {"path": "models/rm", "stage": "reward_model"}}},
        "rewards.model.path models/rm and rewards.model.stage reward_model are both set: set one of them",
    ),
    "a chat for the chain's reward model": (
        {"rewards": {"model": {"stage": "reward_model", "input": "chat"}}},
        "rewards.model.input chat is for a rewards.model.path",
    ),
    "dynamic sampling by verdicts without weight": (
        {
            "rewards": {"model": {"path": "models/rm", "verifier_weight": 0.0}},
            "ppo": {"dynamic_sampling": True},
            "rollout": {"num_samples": 2},
        },
        "ppo.dynamic_sampling keeps prompts whose verdicts differ, which rewards.model.verifier_weight 0",
    ),
    "a best that nobody measures": (
        {"ppo": {"checkpoint": {"keep_best": {"metric": "evaluation/avg"}}}},
        "ppo.checkpoint.keep_best.metric evaluation/avg needs ppo.evaluate_every > 0",
    ),
    "an export of a best that is not kept": (
        {"stages": ["sft", "ppo", "export"], "export": {"checkpoint": "best"}},
        "export.checkpoint best needs ppo.checkpoint.keep_best.metric",
    ),
    "an export of no name": (
        {"stages": ["sft", "export"], "export": {"checkpoint": "newest"}},
        "export.checkpoint must be last, best or iter_N, such as iter_120, got 'newest'",
    ),
    "overlong": (
        {"returns": {"overlong_penalty_tokens": 2000}},
        "returns.overlong_penalty_tokens 2000 is more than rollout.max_tokens 1024",
    ),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_problem_is_named_with_its_numbers(name: str) -> None:
    sections, message = PROBLEMS[name]
    with pytest.raises(UserError) as failure:
        check_config(make_config(**sections))
    assert message in str(failure.value)


def test_only_stages_of_the_chain_are_looked_at() -> None:
    check_config(make_config("sft", ppo={"advantage": {"baseline": "rloo"}, "critic": {"init": "value_pretrain"}}))


def test_fresh_rollouts_come_in_whole_prompts() -> None:
    sections: dict[str, dict] = {"value_pretrain": {"init": "sft", "batch_size": 10}, "rollout": {"num_samples": 4}}
    with pytest.raises(UserError, match=r"batch_size 10 must be a multiple of rollout\.num_samples 4"):
        check_config(make_config("sft", "value_pretrain", **sections))
    sections["value_pretrain"]["rollouts"] = "stored"
    check_config(make_config("sft", "value_pretrain", **sections))


def test_the_recipe_for_32b_is_complete_but_for_paths_and_has_the_papers_settings() -> None:
    paths = [f"{key}=x" for key in ("run.dir", "model.hf", "sft.train", "prompts.train", "prompts.test")]
    profiles = [CONFIGS / "cluster" / "example-h100.yaml"]
    config = load_config(CONFIGS / "recipes" / "vcppo_32b.yaml", paths, profiles=profiles)
    ppo, advantage = config.ppo, config.ppo.advantage
    assert (config.returns.gamma, advantage.lam_actor, advantage.lam_critic) == (1.0, 0.95, 1.0)
    assert advantage.baseline == "critic"
    assert (ppo.loss.kl_coef, ppo.loss.clip_low, ppo.loss.clip_high) == (0.0, 0.2, 0.2)
    assert (ppo.optimizer.lr, ppo.critic.optimizer.lr) == (1e-6, 2e-6)
    assert ppo.prompts_per_iteration * config.rollout.num_samples / ppo.minibatches == 512
    assert (config.value_pretrain.steps, config.value_pretrain.stop_when_stable) == (100, False)
    assert (ppo.critic.init, ppo.critic.value_clip, config.model.max_length) == ("value_pretrain", None, 16384)


@pytest.mark.parametrize("method", ["vapo", "dapo", "grpo"])
def test_the_recipes_of_other_methods_have_the_papers_settings(method: str) -> None:
    paths = [f"{key}=x" for key in ("run.dir", "model.hf", "sft.train", "prompts.train", "prompts.test")]
    profiles = [CONFIGS / "cluster" / "example-h100.yaml"]
    config = load_config(CONFIGS / "recipes" / f"{method}_32b.yaml", paths, profiles=profiles)
    ppo, loss = config.ppo, config.ppo.loss
    assert (ppo.prompts_per_iteration, config.rollout.num_samples, ppo.minibatches) == (512, 16, 16)
    assert (ppo.optimizer.lr, ppo.schedule.kind, ppo.schedule.warmup_steps) == (1e-6, "constant", 20)
    assert (loss.clip_low, loss.clip_high, loss.kl_coef) == (0.2, 0.2 if method == "grpo" else 0.28, 0.0)
    assert loss.aggregation == ("sequence" if method == "grpo" else "token")
    assert (config.evaluate.num_samples, config.evaluate.temperature, config.evaluate.top_p) == (32, 1.0, 0.7)
    assert ppo.advantage.baseline == ("critic" if method == "vapo" else "grpo")
    if method == "vapo":
        assert (ppo.advantage.length_adaptive_alpha, ppo.advantage.lam_critic, loss.positive_lm_coef) == (0.05, 1, 0.1)
        assert (config.value_pretrain.steps, ppo.critic.optimizer.lr) == (50, 2e-6)
    if method == "dapo":
        assert (config.rollout.max_tokens, config.returns.overlong_penalty_tokens) == (16384 + 4096, 4096)
        assert ppo.dynamic_sampling


def test_the_recipe_with_adapters_is_the_other_one_but_for_what_it_says() -> None:
    paths = [f"{key}=x" for key in ("run.dir", "model.hf", "sft.train", "prompts.train", "prompts.test")]
    profiles = [CONFIGS / "cluster" / "example-h100.yaml"]
    full, lora = (
        load_config(CONFIGS / "recipes" / f"vcppo_32b{name}.yaml", paths, profiles=profiles) for name in ("", "_lora")
    )
    assert (lora.model.lora.rank, lora.model.lora.alpha, len(lora.model.lora.targets)) == (32, 64.0, 7)
    for section in ("returns", "values", "rollout", "prompts", "rewards"):
        assert getattr(lora, section) == getattr(full, section)
    for stage in ("sft", "reward_model", "value_pretrain", "ppo"):
        assert getattr(lora, stage).optimizer.lr == pytest.approx(10 * getattr(full, stage).optimizer.lr), stage
    assert lora.ppo.critic.optimizer.lr == pytest.approx(10 * full.ppo.critic.optimizer.lr)
    assert (lora.parallel.tp, lora.parallel.pp, full.parallel.pp) == (8, 1, 2)


@pytest.mark.parametrize(
    ("lora", "peft", "message"),
    [
        ({"rank": 8, "targets": []}, False, r"model\.lora\.rank 8 needs model\.lora\.targets"),
        ({"rank": 8, "targets": ["q_proj", "q_proj"]}, False, r"model\.lora\.targets names q_proj 2 times"),
        ({"rank": 8, "weights": "x"}, False, r"model\.lora\.rank 8 takes the weights of model\.hf, not model\.weights"),
        ({}, True, r"export\.peft exports adapters: it needs model\.lora\.rank"),
    ],
)
def test_adapters_that_cannot_be_are_refused(lora: dict, peft: bool, message: str) -> None:
    model = {"weights": lora.pop("weights", None), "lora": lora}
    with pytest.raises(UserError, match=message):
        check_config(make_config("sft", "export", model=model, export={"peft": peft}))


def test_nothing_is_frozen_below_adapters() -> None:
    sections = {"model": {"lora": {"rank": 8}}, "ppo": {"critic": {"init": "sft", "frozen": ["*.self_attn.*"]}}}
    with pytest.raises(UserError, match=r"ppo\.critic\.frozen .*: below adapters .* all is frozen"):
        check_config(make_config(**sections))


def test_a_template_has_a_place_for_the_prompt() -> None:
    with pytest.raises(UserError, match=r"prompts\.template must contain \{prompt\}"):
        check_config(make_config("sft", prompts={"template": "Question: "}))


def test_pretraining_from_a_checkpoint_names_it() -> None:
    config = make_config("sft", "value_pretrain", value_pretrain={"init": "checkpoint"})
    with pytest.raises(UserError, match=r"value_pretrain\.init checkpoint needs value_pretrain\.checkpoint_path"):
        check_config(config)
    config.value_pretrain.checkpoint_path = "x"
    check_config(config)
