"""The chain and its stages' settings; only the settings of stages in the chain are looked at."""

import re
from collections.abc import Iterator

from megatron_vcppo.config.placement import uses_engines
from megatron_vcppo.config.schema import Config


def stages(config: Config) -> Iterator[str]:
    """A chain of different stages."""
    if not config.stages:
        yield "stages is empty: set it to the stages to run, such as [sft, export]"
    for stage in dict.fromkeys(config.stages):
        if config.stages.count(stage) > 1:
            yield f"stages names {stage} {config.stages.count(stage)} times: name it once"
    if "export" in config.stages and not {"sft", "ppo"} & set(config.stages[: config.stages.index("export")]):
        yield f"stages {', '.join(config.stages)}: export has no actor to export: put it behind sft or ppo"


def fp8(config: Config) -> Iterator[str]:
    """What 8-bit products need."""
    model, cluster = config.model, config.cluster
    if model.fp8 == "off":
        return
    if model.dtype != "bfloat16":
        yield f"model.fp8 {model.fp8} needs model.dtype bfloat16, got {model.dtype}"
    if model.layers == "torch":
        yield f"model.fp8 {model.fp8} needs Transformer Engine's layers, but model.layers is torch"
    if cluster.gpus_per_node == 0:
        yield f"model.fp8 {model.fp8} needs GPUs, but cluster.gpus_per_node is 0: set model.fp8=off"


def lora(config: Config) -> Iterator[str]:
    """Adapters have layers to be in, and an export of them has adapters."""
    settings = config.model.lora
    if settings.rank is not None:
        if not settings.targets:
            yield f"model.lora.rank {settings.rank} needs model.lora.targets: name at least one layer, such as [q_proj]"
        for target in dict.fromkeys(settings.targets):
            if (count := settings.targets.count(target)) > 1:
                yield f"model.lora.targets names {target} {count} times: name it once"
        if config.model.weights is not None:
            yield (
                f"model.lora.rank {settings.rank} takes the weights of model.hf, not model.weights, a checkpoint of "
                "Megatron-LM: set that to null"
            )
        frozen = {"value_pretrain.frozen": config.value_pretrain.frozen, "ppo.critic.frozen": config.ppo.critic.frozen}
        for key, patterns in frozen.items():
            if patterns:
                yield f"{key} {patterns}: below adapters (model.lora.rank {settings.rank}) all is frozen: set it to []"
    if config.export.peft and settings.rank is None and "export" in config.stages:
        yield "export.peft exports adapters: it needs model.lora.rank"


def sft(config: Config) -> Iterator[str]:
    """The warm-up ends within training."""
    steps, warmup = config.sft.steps, config.sft.schedule.warmup_steps
    if steps is not None and warmup > steps:
        yield f"sft.schedule.warmup_steps {warmup} is more than sft.steps {steps}"


def prompt_template(config: Config) -> Iterator[str]:
    """The template has a place for the prompt."""
    if "{prompt}" not in config.prompts.template:
        yield f"prompts.template must contain {{prompt}}, where the prompt is put, got {config.prompts.template!r}"


def response_length(config: Config) -> Iterator[str]:
    """rollout.max_tokens against the model's length and the overlong penalty."""
    if not uses_engines(config):
        return
    longest, room = config.rollout.max_tokens, config.model.max_length
    if longest >= room:
        yield f"rollout.max_tokens {longest} leaves no room for a prompt: it must be below model.max_length {room}"
    penalty = config.returns.overlong_penalty_tokens
    if penalty > longest and not {"value_pretrain", "ppo"}.isdisjoint(config.stages):
        yield f"returns.overlong_penalty_tokens {penalty} is more than rollout.max_tokens {longest}"


def values(config: Config) -> Iterator[str]:
    """Bounds of values are an interval."""
    bounds, read = config.values.bounds, not {"value_pretrain", "ppo"}.isdisjoint(config.stages)
    if read and bounds is not None and (len(bounds) != 2 or bounds[0] >= bounds[1]):
        yield f"values.bounds must be two increasing numbers [low, high], got {bounds}"


def value_pretrain(config: Config) -> Iterator[str]:
    """The critic's start, and steps of whole prompts."""
    if "value_pretrain" not in config.stages:
        return
    settings, num_samples = config.value_pretrain, config.rollout.num_samples
    if settings.init == "checkpoint" and settings.checkpoint_path is None:
        yield "value_pretrain.init checkpoint needs value_pretrain.checkpoint_path"
    if settings.rollouts == "fresh" and settings.batch_size % num_samples:
        yield (
            f"value_pretrain.batch_size {settings.batch_size} must be a multiple of rollout.num_samples {num_samples}: "
            "a step trains on whole prompts"
        )


def ppo(config: Config) -> Iterator[str]:
    """The critic or the group baseline, sampling and minibatches."""
    if "ppo" not in config.stages:
        return
    settings, num_samples = config.ppo, config.rollout.num_samples
    baseline, critic = settings.advantage.baseline, settings.critic
    if baseline == "critic":
        if critic.init == "checkpoint" and critic.checkpoint_path is None:
            yield "ppo.critic.init checkpoint needs ppo.critic.checkpoint_path"
    else:
        if num_samples < 2:
            yield f"ppo.advantage.baseline {baseline} needs rollout.num_samples > 1, got {num_samples}"
        if settings.critic_only_iterations:
            yield (
                f"ppo.critic_only_iterations {settings.critic_only_iterations} needs a critic, but "
                f"ppo.advantage.baseline {baseline} has none: set it to 0"
            )
    for key in ("tis_cap", "dual_clip", "max_logprob_error"):
        if settings.loss.kind == "dis" and (value := getattr(settings.loss, key)) is not None:
            yield f"ppo.loss.{key} {value} belongs to ppo.loss.kind clip: with dis, set it to null"
    if settings.dynamic_sampling and num_samples < 2:
        yield f"ppo.dynamic_sampling needs rollout.num_samples > 1, got {num_samples}"
    if settings.dynamic_sampling and settings.staleness:
        yield (
            f"ppo.staleness {settings.staleness} cannot be combined with ppo.dynamic_sampling, whose rounds depend on "
            "each other: set ppo.staleness=0"
        )
    if settings.partial_rollouts and (not settings.staleness or config.weight_sync.pause != "keep"):
        yield (
            f"ppo.partial_rollouts needs ppo.staleness > 0 and weight_sync.pause keep, got {settings.staleness} and "
            f"{config.weight_sync.pause}: responses run on through pushes"
        )
    rollouts = settings.prompts_per_iteration * num_samples
    if settings.minibatches > rollouts:
        yield (
            f"ppo.minibatches {settings.minibatches} is more than the {rollouts} rollouts of an iteration "
            f"(ppo.prompts_per_iteration {settings.prompts_per_iteration} × rollout.num_samples {num_samples})"
        )


def windows(config: Config) -> Iterator[str]:
    """What needs whole responses, or whole groups of them, does not go with responses in windows."""
    settings, model = config.ppo, config.rewards.model
    if "ppo" not in config.stages or settings.window_tokens is None:
        return
    excluded: dict[str, tuple[object, object, str]] = {
        "ppo.advantage.baseline": (settings.advantage.baseline, "critic", "compares whole groups"),
        "ppo.advantage.explained_variance_gate": (
            settings.advantage.explained_variance_gate,
            False,
            "replaces advantages by returns, which unfinished responses do not have",
        ),
        "ppo.dynamic_sampling": (settings.dynamic_sampling, False, "compares whole groups"),
        "ppo.staleness": (settings.staleness, 0, "takes whole groups from a queue"),
        "rewards.model.path": (model.path, None, "scores whole responses"),
        "rewards.model.stage": (model.stage, None, "scores whole responses"),
        "rollout.stop": (config.rollout.stop, [], "would miss a text that two windows share"),
        "prompts.tools": (config.prompts.tools, {}, "calls tools between the turns of whole responses"),
    }
    for key, (value, off, reason) in excluded.items():
        if value != off:
            yield f"ppo.window_tokens {settings.window_tokens} cannot be combined with {key} {value}, which {reason}"


def model_reward(config: Config) -> Iterator[str]:
    """One reward model, which reads what it was made for."""
    model = config.rewards.model
    if {"value_pretrain", "ppo"}.isdisjoint(config.stages):
        return
    if model.path is not None and model.stage is not None:
        yield f"rewards.model.path {model.path} and rewards.model.stage {model.stage} are both set: set one of them"
    elif model.stage is not None and model.input != "tokens":
        yield (
            f"rewards.model.input {model.input} is for a rewards.model.path: the model of stage {model.stage} was "
            "trained on tokens"
        )
    unrewarded = model.verifier_weight == 0 and (model.path or model.stage)
    if unrewarded and "ppo" in config.stages and config.ppo.dynamic_sampling:
        yield (
            "ppo.dynamic_sampling keeps prompts whose verdicts differ, which rewards.model.verifier_weight 0 does not "
            "reward: change one of them"
        )


def adaptive_kl(config: Config) -> Iterator[str]:
    """A target needs a KL term to adapt."""
    loss = config.ppo.loss
    if "ppo" in config.stages and loss.kl_target is not None and (loss.kl_coef == 0 or loss.kl_in != "loss"):
        yield (
            f"ppo.loss.kl_target {loss.kl_target:g} adapts a KL term in the loss: it needs ppo.loss.kl_coef > 0 "
            f"(got {loss.kl_coef:g}) and ppo.loss.kl_in loss (got {loss.kl_in})"
        )


def evaluation(config: Config) -> Iterator[str]:
    """Held-out problems, and k within the number of samples."""
    every = config.ppo.evaluate_every if "ppo" in config.stages else 0
    if "evaluate" not in config.stages and not every:
        return
    if config.prompts.test is None:
        what = "stage evaluate" if "evaluate" in config.stages else f"ppo.evaluate_every {every}"
        yield f"{what} needs held-out problems: set prompts.test"
    for k in config.evaluate.k:
        if k > config.evaluate.num_samples:
            yield f"evaluate.k {k} is more than evaluate.num_samples {config.evaluate.num_samples}"


def kept_checkpoints(config: Config) -> Iterator[str]:
    """What is best must be measured, and what is exported must be kept."""
    metric = config.ppo.checkpoint.keep_best.metric
    never = not config.ppo.evaluate_every
    if "ppo" in config.stages and metric is not None and metric.startswith("evaluation/") and never:
        yield f"ppo.checkpoint.keep_best.metric {metric} needs ppo.evaluate_every > 0"
    if "export" not in config.stages:
        return
    chosen = config.export.checkpoint
    if not re.fullmatch(r"last|best|iter_\d{1,18}", chosen):
        yield f"export.checkpoint must be last, best or iter_N, such as iter_120, got {chosen!r}"
    before = config.stages[: config.stages.index("export")]
    source = next((stage for stage in reversed(before) if stage in ("sft", "ppo")), None)
    if chosen == "best" and source is not None and getattr(config, source).checkpoint.keep_best.metric is None:
        yield f"export.checkpoint best needs {source}.checkpoint.keep_best.metric, by which checkpoints are compared"


CHAIN_RULES = (
    stages,
    fp8,
    lora,
    sft,
    prompt_template,
    response_length,
    values,
    value_pretrain,
    ppo,
    windows,
    model_reward,
    adaptive_kl,
    evaluation,
    kept_checkpoints,
)
