"""Keys of the stages after SFT that must fit each other; only stages of the chain are looked at."""

from collections.abc import Iterator
from pathlib import Path

from megatron_vcppo.config.placement import uses_engines
from megatron_vcppo.config.schema import Config


def check_rl(config: Config) -> Iterator[str]:
    """One line per problem."""
    stages = set(config.stages)
    if uses_engines(config):
        yield from _rollouts(config)
    if "value_pretrain" in stages:
        settings, num_samples = config.value_pretrain, config.rollout.num_samples
        yield from _critic_source(config, "value_pretrain", settings.init, settings.checkpoint_path)
        if settings.rollouts == "fresh" and settings.batch_size % num_samples:
            yield (
                f"value_pretrain.batch_size {settings.batch_size} is no multiple of rollout.num_samples {num_samples}: "
                "a step takes whole prompts"
            )
    if "ppo" in stages:
        yield from _ppo(config)
        yield from _ppo_losses(config)
    if "evaluate" in stages or ("ppo" in stages and config.ppo.evaluate_every):
        yield from _evaluation(config)


def _rollouts(config: Config) -> Iterator[str]:
    longest, room = config.rollout.max_tokens, config.model.max_length
    if longest >= room:
        yield f"rollout.max_tokens {longest} leaves no room for a prompt: it must be below model.max_length {room}"
    if config.rollout.engine.sleep_level not in (1, 2):
        yield f"rollout.engine.sleep_level must be 1 or 2, got {config.rollout.engine.sleep_level}"
    if config.rollout.temperature <= 0:
        yield f"rollout.temperature must be over 0, got {config.rollout.temperature}"


def _critic_source(config: Config, stage: str, init: str, checkpoint_path: str | None) -> Iterator[str]:
    section = "ppo.critic" if stage == "ppo" else stage
    if init == "checkpoint" and checkpoint_path is None:
        yield f"{section}.init checkpoint needs {section}.checkpoint_path"
    if init not in ("value_pretrain", "reward_model"):
        return
    chain: list[str] = [*config.stages]
    before = chain[: chain.index(stage)]
    if init not in before and not (Path(config.run.dir) / init / "manifest.json").exists():
        yield (
            f"{section}.init {init} needs stage {init}, which is neither before {stage} in stages "
            f"({', '.join(chain)}) nor done in {config.run.dir}"
        )


def _ppo(config: Config) -> Iterator[str]:
    ppo, num_samples = config.ppo, config.rollout.num_samples
    baseline = ppo.advantage.baseline
    if baseline == "critic":
        yield from _critic_source(config, "ppo", ppo.critic.init, ppo.critic.checkpoint_path)
    else:
        if num_samples < 2:
            yield f"ppo.advantage.baseline {baseline} needs rollout.num_samples over 1, got {num_samples}"
        if ppo.critic_only_iterations:
            yield (
                f"ppo.critic_only_iterations {ppo.critic_only_iterations} needs a critic, and "
                f"ppo.advantage.baseline {baseline} has none"
            )
    if ppo.dynamic_sampling and num_samples < 2:
        yield f"ppo.dynamic_sampling needs rollout.num_samples over 1, got {num_samples}"
    if ppo.dynamic_sampling and ppo.staleness:
        yield f"ppo.staleness {ppo.staleness} does not go with ppo.dynamic_sampling: its rounds wait for each other"
    rollouts = ppo.prompts_per_iteration * num_samples
    if ppo.minibatches > rollouts:
        yield (
            f"ppo.minibatches {ppo.minibatches} is more than the {rollouts} rollouts of an iteration "
            f"(ppo.prompts_per_iteration {ppo.prompts_per_iteration} × rollout.num_samples {num_samples})"
        )


def _ppo_losses(config: Config) -> Iterator[str]:
    loss, bounds = config.ppo.loss, config.ppo.critic.bounds
    penalty, longest = config.ppo.advantage.overlong_penalty_tokens, config.rollout.max_tokens
    if bounds is not None and (len(bounds) != 2 or bounds[0] >= bounds[1]):
        yield f"ppo.critic.bounds must be two rising numbers, got {bounds}"
    if penalty > longest:
        yield f"ppo.advantage.overlong_penalty_tokens {penalty} is more than rollout.max_tokens {longest}"
    if loss.dual_clip is not None and loss.dual_clip <= 1:
        yield f"ppo.loss.dual_clip must be over 1, got {loss.dual_clip}"
    if loss.kl_target is not None and (loss.kl_coef == 0 or loss.kl_in != "loss"):
        yield (
            f"ppo.loss.kl_target {loss.kl_target:g} adapts a KL term in the loss: it needs ppo.loss.kl_coef over 0 "
            f"(got {loss.kl_coef:g}) and ppo.loss.kl_in loss (got {loss.kl_in})"
        )


def _evaluation(config: Config) -> Iterator[str]:
    settings = config.evaluate
    if config.prompts.test is None:
        what = "stage evaluate" if "evaluate" in config.stages else f"ppo.evaluate_every {config.ppo.evaluate_every}"
        yield f"{what} needs held-out problems: set prompts.test"
    for k in settings.k:
        if not 1 <= k <= settings.num_samples:
            yield f"evaluate.k {k} must lie in 1 … evaluate.num_samples {settings.num_samples}"
