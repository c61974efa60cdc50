"""A reward model: a scalar head on the SFT model that scores a response at its last token.

The paper's baseline takes its critic from such a model. Trained to reject incomplete responses, it scores every
prefix low, and a critic that starts from it favors giving up early: ``reward_model.truncated_share`` is the dial.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from megatron_vcppo.algo.losses.value import pairwise_loss, pointwise_loss
from megatron_vcppo.algo.metrics import Metrics
from megatron_vcppo.config import Config, RewardModelConfig
from megatron_vcppo.data.epoch_order import EpochOrder
from megatron_vcppo.data.packer import Packer
from megatron_vcppo.data.packing import PackedMicrobatch
from megatron_vcppo.data.seeds import truncation_seed
from megatron_vcppo.errors import UserError
from megatron_vcppo.mcore import runtime
from megatron_vcppo.mcore.learner import Critic
from megatron_vcppo.mcore.model import ActorModel
from megatron_vcppo.records import Rollout, TrainSequence
from megatron_vcppo.run.events import startup
from megatron_vcppo.stages.initial_models import starting_critic
from megatron_vcppo.stages.loop import TrainLoop
from megatron_vcppo.stages.rollout_session import RolloutSession
from megatron_vcppo.stages.rollout_source import StoredRollouts, rollout_source
from megatron_vcppo.stages.speed import work
from megatron_vcppo.stages.stage import Stage, start_stage

FIELDS: dict[str, type] = {"last_mask": bool, "label": float}


def run(config: Config) -> None:
    """Train the reward model; leaves RUN/reward_model/checkpoints. Raises Saved if asked to stop."""
    stage, settings = start_stage(config, "reward_model"), config.reward_model
    with RolloutSession(stage) as session:
        session.start_engines()
        responses, actor = load_responses(stage, session)
        examples = label_responses(responses, settings, config.run.seed)
    startup.done("rollouts")
    units = training_units(examples, settings)
    model = Critic(
        starting_critic(config, "reward_model", "sft", checkpoint_path=None, actor=actor),
        config.parallel,
        settings.optimizer,
        settings.schedule,
        settings.steps,
    )
    startup.done("model")
    order = EpochOrder(len(units), config.run.seed, "responses of the reward model")
    loop = TrainLoop(stage, {"critic": model}, settings.steps, settings.checkpoint, unit="responses")
    loop.track(order=order)
    with loop:
        for _ in loop:
            batch = [units[index] for _, index in order.next(units_per_step(settings))]
            microbatches, loss = make_step(batch, stage.packer, settings)
            result = model.train_step(microbatches, loss)
            metrics = {f"reward_model/{name}": value for name, value in result.metrics.items()}
            metrics |= {"reward_model/grad_norm": result.grad_norm, "time/step_s": loop.step_seconds}
            metrics |= work(stage, (len(sequence) for unit in batch for sequence in unit))
            shown = {"loss": result.metrics["reward_model_loss"], "accuracy": result.metrics["accuracy"]}
            loop.log(metrics, count=sum(map(len, batch)), shown=shown, skipped={"reward model": [not result.applied]})
    runtime.stop()


def load_responses(stage: Stage, session: RolloutSession) -> tuple[list[Rollout], ActorModel | None]:
    """Verified responses of the SFT actor, generated once and kept in RUN/reward_model/rollouts; and that actor, if it
    was loaded to generate them."""
    source = rollout_source(stage, session, reached=0)
    assert isinstance(source, StoredRollouts)
    rollouts = source.read_all()
    return [rollouts[number] for _, number in source.order.next(len(rollouts))], source.actor


def label_responses(
    rollouts: list[Rollout], settings: RewardModelConfig, run_seed: int
) -> list[tuple[TrainSequence, bool]]:
    """(sequence, good) of each response; a share is truncated at a random token and labeled bad.

    The score is read where the response ends. One more token, which the model's causal output there cannot see, takes
    the field to that place.
    """
    generator = np.random.default_rng(truncation_seed(run_seed))
    examples = []
    for rollout in rollouts:
        response, good = rollout.response_ids, rollout.is_correct
        if generator.random() < settings.truncated_share and len(response) > 1:
            response, good = response[: int(generator.integers(1, len(response)))], False
        ids = (*rollout.prompt.token_ids, *response, 0)
        no, zeros = (False,) * (len(ids) - 1), (0.0,) * (len(ids) - 1)
        examples.append((TrainSequence(ids, {"last_mask": (*no, True), "label": (*zeros, float(good))}), good))
    return examples


def training_units(
    examples: list[tuple[TrainSequence, bool]], settings: RewardModelConfig
) -> list[tuple[TrainSequence, ...]]:
    """What is drawn and sharded as one: a response, or a (good, bad) pair of responses.

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


def make_step(
    batch: list[tuple[TrainSequence, ...]], packer: Packer, settings: RewardModelConfig
) -> tuple[list[PackedMicrobatch], "PointwiseLoss | PairwiseLoss"]:
    """This replica's micro-batches and the loss of one step; the responses of a pair lie side by side."""
    if settings.loss != "pairwise":
        mine = packer.shard([len(sequence) for (sequence,) in batch])
        return packer.pack([batch[i][0] for i in mine], FIELDS), PointwiseLoss(settings, len(batch))
    return packer.pack_groups(batch, FIELDS), PairwiseLoss(len(batch))


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class PairwiseLoss:
    """Bradley–Terry over the pairs of a micro-batch, which lie side by side: good, bad, good, bad, …"""

    denominator: int

    def __call__(self, outputs: Tensor, microbatch: PackedMicrobatch) -> tuple[Tensor, Metrics]:
        """outputs: scores [T]."""
        chosen, rejected = outputs[microbatch.fields["last_mask"]].view(-1, 2).unbind(1)
        return pairwise_loss(chosen=chosen, rejected=rejected, denominator=self.denominator)
