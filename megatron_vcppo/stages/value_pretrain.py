"""Value pretraining (VC-PPO, section 3.2): the critic learns Monte-Carlo returns of the fixed policy, before PPO."""

import time
from typing import Any

from megatron_vcppo.algo.gae import decoupled_gae
from megatron_vcppo.algo.metrics import explained_variance
from megatron_vcppo.algo.token_rewards import token_rewards
from megatron_vcppo.config import Config
from megatron_vcppo.config.rl import CriticConfig, ValuePretrainConfig
from megatron_vcppo.data.rollout_batch import Packer, RolloutBatch, make_batch
from megatron_vcppo.errors import Stopped
from megatron_vcppo.mcore import runtime
from megatron_vcppo.mcore.checkpoint import CheckpointFolder
from megatron_vcppo.mcore.learner import Critic, StepResult
from megatron_vcppo.run.metrics_log import MetricsLog
from megatron_vcppo.run.progress import Progress
from megatron_vcppo.run.startup import startup
from megatron_vcppo.stages.advantage_batch import episode_rewards, reward_statistics, trained_mask
from megatron_vcppo.stages.initial_models import starting_critic
from megatron_vcppo.stages.nonfinite import NonfiniteUpdates
from megatron_vcppo.stages.rollout_session import RolloutSession
from megatron_vcppo.stages.rollout_source import rollout_source
from megatron_vcppo.stages.stage import mark_done, packer_of, stage_folder
from megatron_vcppo.stages.stopping import Saved, stopping
from megatron_vcppo.stages.training_losses import CriticLoss


def run(config: Config) -> None:
    """Pretrain a critic; leaves RUN/value_pretrain/checkpoints. Raises Saved if asked to stop."""
    settings, folder = config.value_pretrain, stage_folder(config, "value_pretrain")
    world = runtime.start(config.parallel, config.run.seed, config.run.timeout_s)
    startup.done("groups")
    with RolloutSession(config, folder, world) as generation:
        generation.start_engines()
        critic = Critic(
            starting_critic(config, "value_pretrain", settings.init, settings.checkpoint_path),
            *(config.parallel, settings.optimizer, settings.schedule, settings.steps),
        )
        generation.share(critic)
        checkpoints = CheckpointFolder(folder / "checkpoints", config, settings.checkpoint)
        startup.done("model")
        resumed = checkpoints.resume({"critic": critic})
        startup.done("checkpoint")
        step, history, skips = 0, [], NonfiniteUpdates(config.ppo.skip_limit)
        if resumed is not None:
            step, history = resumed.iteration, resumed.state["history"]
            skips.in_a_row = resumed.state["skipped_in_a_row"]
        source = rollout_source(config, generation, "value_pretrain", step)
        if resumed is not None:
            source.load_state_dict(resumed.state["rollouts"])
        startup.done("rollouts")
        log = MetricsLog(folder, config, "value_pretrain", step, settings.steps) if world.is_main else None
        progress = Progress("value_pretrain", settings.steps, step, "rollouts") if world.is_main else None
        reason, saved_step = stopping_reason(history, settings), step

        def save(place: dict[str, Any]) -> None:
            nonlocal saved_step
            state = {"rollouts": place, "history": history, "skipped_in_a_row": skips.in_a_row}
            with stopping.saving():
                checkpoints.save(step, {"critic": critic}, state)
            saved_step = step

        while reason is None:
            started, place = time.monotonic(), source.state_dict()
            try:
                batch = make_batch(source.next(settings.batch_size, step + 1))
                generation.trainer_turn()
                stopping.point()
            except Stopped:  # the next attempt takes the responses that are stored
                if saved_step != step:
                    save(place)
                checkpoints.finish()
                raise Saved(f"asked to stop: saved at step {step}, with responses for the next one") from None
            result = learn_returns(critic, batch, packer_of(config, world), config)
            step += 1
            warning = skips.count({"critic": [not result.applied]})
            metrics = {f"critic/{name}": value for name, value in result.metrics.items()}
            metrics["critic/explained_variance"] = explained_variance(result.metrics)
            metrics |= {"critic/grad_norm": result.grad_norm, "critic/learning_rate": result.learning_rate}
            metrics |= reward_statistics(batch) | {"time/step_s": time.monotonic() - started}
            history.append([metrics["critic/explained_variance"], metrics["critic/value_loss"]])
            if log is not None and progress is not None:
                log.log(step, metrics | stopping.metrics(checkpoints.save_time_s))
                startup.finish(folder)
                shown = {"loss": metrics["critic/value_loss"], "ev": metrics["critic/explained_variance"]}
                progress.update(step, len(batch), shown)
                if warning:
                    print(f"warning: step {step}: {warning}", flush=True)
            reason = stopping_reason(history, settings)
            checkpoints.poll()
            stop = stopping.agreed()
            if reason or stop or skips.too_many or step % settings.checkpoint.save_every == 0:
                save(source.state_dict())
            if skips.too_many:
                checkpoints.finish()
                raise skips.error("value_pretrain", step)
            if stop and reason is None:
                checkpoints.finish()
                raise Saved(f"asked to stop: saved at step {step}")
        checkpoints.finish()
    if log is not None and progress is not None:
        log.close()
        progress.close()
        print(f"value_pretrain: stopped after step {step}: {reason}", flush=True)
        mark_done(folder, checkpoint=folder / "checkpoints" / f"iter_{step:07d}")
    runtime.stop()


def learn_returns(critic: Critic, batch: RolloutBatch, packing: Packer, config: Config) -> StepResult:
    """One optimizer step on ½(V - R)² with Monte-Carlo returns; the metrics are those of V before the step."""
    rewards = token_rewards(episode_rewards(batch, config), batch.response_mask)
    gamma, values = config.ppo.advantage.gamma, rewards * 0
    _, returns = decoupled_gae(
        rewards=rewards, values=values, mask=batch.response_mask, gamma=gamma, lam_actor=1.0, lam_critic=1.0
    )
    mask = trained_mask(batch, config)
    tensors = {"response_mask": mask, "returns": returns}
    share = packing.share([len(r.prompt.token_ids) + len(r.response_ids) for r in batch.rollouts])
    microbatches = packing.pack(batch.sequences(share, tensors), list(tensors))
    # Pretraining has no old values to clip against; bounds and Huber are those of PPO's critic.
    loss = CriticConfig(huber_delta=config.ppo.critic.huber_delta, bounds=config.ppo.critic.bounds)
    return critic.train_step(microbatches, CriticLoss(loss, float(mask.sum())))


def stopping_reason(history: list[list[float]], settings: ValuePretrainConfig) -> str | None:
    """Which rule ends pretraining after these (explained variance, value loss), in words; None: go on."""
    if len(history) >= settings.steps:
        return f"value_pretrain.steps {settings.steps}"
    window = settings.stable_window
    if not settings.stop_when_stable or len(history) < 2 * window:
        return None

    def mean(rows: list[list[float]], column: int) -> float:
        return sum(row[column] for row in rows) / len(rows)

    before, last = history[-2 * window : -window], history[-window:]
    variance_change = abs(mean(last, 0) - mean(before, 0))
    loss_change = abs(mean(last, 1) - mean(before, 1)) / max(mean(before, 1), 1e-12)
    if not (variance_change <= settings.stable_tolerance and loss_change <= settings.stable_tolerance):
        return None
    return (
        f"stable: over the last {window} steps against the {window} before, explained variance changed by "
        f"{variance_change:.3g} and value loss by {100 * loss_change:.2g} % "
        f"(value_pretrain.stable_tolerance {settings.stable_tolerance:g})"
    )
