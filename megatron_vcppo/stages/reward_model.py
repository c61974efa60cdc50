"""A reward model: a scalar head on the SFT model that scores a response at its last token.

The paper's baseline takes its critic from such a model. Trained to reject incomplete responses, it scores every
prefix low, and a critic that starts from it favours giving up early: ``reward_model.cut_share`` is the dial.
"""

import dataclasses
import time

import numpy as np
from torch import Tensor

from megatron_vcppo.algo.losses.pointwise_pairwise import pairwise_loss, pointwise_loss
from megatron_vcppo.algo.metrics import Metrics
from megatron_vcppo.config import Config
from megatron_vcppo.config.rl import RewardModelConfig
from megatron_vcppo.data.epoch_order import EpochOrder
from megatron_vcppo.data.packing import PackedMicrobatch, pack, pack_into_microbatches, round_up
from megatron_vcppo.data.rollout_batch import Packer
from megatron_vcppo.errors import UserError
from megatron_vcppo.mcore import runtime
from megatron_vcppo.mcore.checkpoint import CheckpointFolder
from megatron_vcppo.mcore.learner import Critic
from megatron_vcppo.records import Rollout, TrainSequence
from megatron_vcppo.run.metrics_log import MetricsLog
from megatron_vcppo.run.progress import Progress
from megatron_vcppo.run.startup import startup
from megatron_vcppo.stages.initial_models import starting_critic
from megatron_vcppo.stages.nonfinite import NonfiniteUpdates
from megatron_vcppo.stages.rollout_session import RolloutSession
from megatron_vcppo.stages.rollout_source import rollout_source
from megatron_vcppo.stages.stage import mark_done, packer_of, stage_folder
from megatron_vcppo.stages.stopping import Saved, stopping


def run(config: Config) -> None:
    """Train the reward model; leaves RUN/reward_model/checkpoints. Raises Saved if asked to stop."""
    settings, folder = config.reward_model, stage_folder(config, "reward_model")
    world = runtime.start(config.parallel, config.run.seed, config.run.timeout_s)
    startup.done("groups")
    with RolloutSession(config, folder, world) as generation:
        generation.start_engines()
        examples = units(labelled(responses(config, generation), settings, config.run.seed), settings)
    startup.done("rollouts")
    model = Critic(
        starting_critic(config, "reward_model", "sft", None),
        *(config.parallel, settings.optimizer, settings.schedule, settings.steps),
    )
    checkpoints = CheckpointFolder(folder / "checkpoints", config, settings.checkpoint)
    startup.done("model")
    order = EpochOrder(len(examples), config.run.seed, "responses of the reward model")
    resumed = checkpoints.resume({"critic": model})
    startup.done("checkpoint")
    step, skips = 0, NonfiniteUpdates(config.ppo.skip_limit)
    if resumed is not None:
        step = resumed.iteration
        order.load_state_dict(resumed.state["order"])
        skips.in_a_row = resumed.state.get("skipped_in_a_row", {})
    log = MetricsLog(folder, config, "reward_model", step, settings.steps) if world.is_main else None
    progress = Progress("reward_model", settings.steps, step, "responses") if world.is_main else None
    while step < settings.steps:
        started = time.monotonic()
        batch = [examples[index] for _, index in order.next(units_per_step(settings))]
        step += 1
        result = model.train_step(*step_of(batch, packer_of(config, world), settings))
        warning = skips.count({"reward model": [not result.applied]})
        if log is not None and progress is not None:
            metrics = {f"reward_model/{name}": value for name, value in result.metrics.items()}
            metrics |= {"reward_model/grad_norm": result.grad_norm, "time/step_s": time.monotonic() - started}
            metrics |= stopping.metrics(checkpoints.save_time_s)
            log.log(step, metrics)
            startup.finish(folder)
            shown = {"loss": result.metrics["reward_model_loss"], "accuracy": result.metrics["accuracy"]}
            progress.update(step, sum(map(len, batch)), shown)
            if warning:
                print(f"warning: step {step}: {warning}", flush=True)
        checkpoints.poll()
        stop, last = stopping.agreed(), step == settings.steps
        if last or stop or skips.too_many or step % settings.checkpoint.save_every == 0:
            state = {"order": order.state_dict(), "skipped_in_a_row": skips.in_a_row}
            with stopping.saving():
                checkpoints.save(step, {"critic": model}, state)
        if skips.too_many:
            checkpoints.finish()
            raise skips.error("reward_model", step)
        if stop and not last:
            checkpoints.finish()
            raise Saved(f"asked to stop: saved at step {step} of {settings.steps}")
    checkpoints.finish()
    if log is not None and progress is not None:
        log.close()
        progress.close()
        mark_done(folder, checkpoint=folder / "checkpoints" / f"iter_{step:07d}")
    runtime.stop()


def responses(config: Config, generation: RolloutSession) -> list[Rollout]:
    """Verified responses of the SFT actor, generated once and kept in RUN/reward_model/rollouts."""
    total = config.reward_model.num_prompts * config.rollout.num_samples
    return rollout_source(config, generation, "reward_model", 0).next(total, 0)


def labelled(rollouts: list[Rollout], settings: RewardModelConfig, seed: int) -> list[tuple[TrainSequence, bool]]:
    """(sequence, good) of each response; a share is cut at a random token and labelled bad.

    The score is read where the response ends. One more token, which the model's causal output there cannot see, takes
    the field to that place.
    """
    generator = np.random.default_rng([seed, 17])
    examples = []
    for rollout in rollouts:
        response, good = rollout.response_ids, (rollout.reward or 0.0) > 0
        if generator.random() < settings.cut_share and len(response) > 1:
            response, good = response[: int(generator.integers(1, len(response)))], False
        ids = (*rollout.prompt.token_ids, *response, 0)
        zeros = (0.0,) * (len(ids) - 1)
        examples.append((TrainSequence(ids, {"last_mask": (*zeros, 1.0), "label": (*zeros, float(good))}), good))
    return examples


def units(examples: list[tuple[TrainSequence, bool]], settings: RewardModelConfig) -> list[tuple[TrainSequence, ...]]:
    """What is drawn and shared out as one: a response, or a (good, bad) pair of responses.

    Every response is in a pair; of the rarer kind each is in several. Raises UserError if one kind is missing.
    """
    if settings.loss != "pairwise":
        return [(sequence,) for sequence, _ in examples]
    good = [sequence for sequence, label in examples if label]
    bad = [sequence for sequence, label in examples if not label]
    if not good or not bad:
        raise UserError("reward_model: every response has the same label; pairwise training needs right and wrong ones")
    return [(good[i % len(good)], bad[i % len(bad)]) for i in range(max(len(good), len(bad)))]


def units_per_step(settings: RewardModelConfig) -> int:
    """A step takes batch_size responses."""
    return max(1, settings.batch_size // 2) if settings.loss == "pairwise" else settings.batch_size


def step_of(
    batch: list[tuple[TrainSequence, ...]], packing: Packer, settings: RewardModelConfig
) -> tuple[list[PackedMicrobatch], "PointwiseLoss | PairwiseLoss"]:
    """This replica's micro-batches and the loss of one step; the responses of a pair lie side by side."""
    names = ["last_mask", "label"]
    if settings.loss != "pairwise":
        mine = packing.share([len(sequence) for (sequence,) in batch])
        return packing.pack([batch[i][0] for i in mine], names), PointwiseLoss(settings, len(batch))
    lengths = [sum(round_up(len(sequence), packing.segment_multiple) for sequence in pair) for pair in batch]
    mine = packing.share(lengths)
    flat = [sequence for i in mine for sequence in batch[i]]
    bins = pack_into_microbatches([lengths[i] for i in mine], packing.tokens_per_microbatch) or [[]]
    rounding = (packing.multiple, packing.segment_multiple)
    microbatches = [pack(flat, [k for i in indices for k in (2 * i, 2 * i + 1)], *rounding, names) for indices in bins]
    return microbatches, PairwiseLoss(len(batch))


@dataclasses.dataclass(frozen=True)
class PointwiseLoss:
    """bce or mse at the last tokens."""

    settings: RewardModelConfig
    denominator: int

    def __call__(self, outputs: Tensor, microbatch: PackedMicrobatch) -> tuple[Tensor, Metrics]:
        """outputs: scores [T]."""
        labels = microbatch.fields["label"]
        if self.settings.loss == "mse":
            labels = 2 * labels - 1
        return pointwise_loss(
            outputs,
            labels=labels,
            last_mask=microbatch.fields["last_mask"],
            kind=self.settings.loss,
            denominator=self.denominator,
            label_smoothing=self.settings.label_smoothing,
        )


@dataclasses.dataclass(frozen=True)
class PairwiseLoss:
    """Bradley–Terry over the pairs of a micro-batch, which lie side by side: good, bad, good, bad, …"""

    denominator: int

    def __call__(self, outputs: Tensor, microbatch: PackedMicrobatch) -> tuple[Tensor, Metrics]:
        """outputs: scores [T]."""
        chosen, rejected = outputs[microbatch.fields["last_mask"]].view(-1, 2).unbind(1)
        return pairwise_loss(chosen=chosen, rejected=rejected, denominator=self.denominator)
