"""Value pretraining (VC-PPO, section 3.2): the critic learns Monte-Carlo returns of the fixed policy, before PPO."""

import torch

from megatron_vcppo.algo.gae import decoupled_gae
from megatron_vcppo.algo.kl import token_rewards
from megatron_vcppo.algo.metrics import explained_variance
from megatron_vcppo.config import Config, ReturnsConfig, ValuePretrainConfig, ValuesConfig
from megatron_vcppo.data.packer import Packer
from megatron_vcppo.data.rollout_share import RolloutShare, RolloutTable, field_types
from megatron_vcppo.mcore import runtime
from megatron_vcppo.mcore.learner import Critic, StepResult
from megatron_vcppo.run.events import startup
from megatron_vcppo.run.log import say
from megatron_vcppo.stages.advantage_batch import episode_rewards, reward_statistics, trained_rollouts
from megatron_vcppo.stages.initial_models import starting_critic
from megatron_vcppo.stages.loop import TrainLoop
from megatron_vcppo.stages.model_rewards import ModelRewards, tracked
from megatron_vcppo.stages.rollout_session import RolloutSession
from megatron_vcppo.stages.rollout_source import rollout_source
from megatron_vcppo.stages.share_exchange import share_out
from megatron_vcppo.stages.speed import work
from megatron_vcppo.stages.stage import start_stage
from megatron_vcppo.stages.training_losses import CriticLoss, LossSize


def run(config: Config) -> None:
    """Pretrain a critic; leaves RUN/value_pretrain/checkpoints. Raises Saved if asked to stop."""
    stage, settings = start_stage(config, "value_pretrain"), config.value_pretrain
    with RolloutSession(stage) as session:
        session.start_engines()
        critic = Critic(
            starting_critic(config, "value_pretrain", settings.init, settings.checkpoint_path),
            config.parallel,
            settings.optimizer,
            settings.schedule,
            settings.steps,
        )
        session.share(critic)
        model_rewards = ModelRewards.of(stage, session)
        startup.done("model")
        loop = TrainLoop(
            stage, {"critic": critic}, settings.steps, settings.checkpoint, session=session, unit="rollouts"
        )
        source, fit = rollout_source(stage, session, loop.step, model_rewards, critic.model), FitHistory(settings)
        loop.track(rollouts=source, history=fit, **tracked(model_rewards))
        startup.done("rollouts")
        with loop:
            if fit.stopping_reason:
                loop.end()
            for step in loop:
                share = share_out(source.next(settings.batch_size, step))
                reward_metrics: dict[str, float] = {}
                if model_rewards is not None:
                    share, reward_metrics = model_rewards.add_to(share)
                session.trainer_turn()
                loop.point()
                result = learn_returns(
                    critic,
                    share,
                    stage.packer,
                    returns_config=config.returns,
                    values_config=config.values,
                    max_tokens=config.rollout.max_tokens,
                )
                metrics = step_metrics(result, share.batch, loop.step_seconds) | reward_metrics
                metrics |= work(stage, share.batch.sequence_lengths)
                fit.add(metrics["critic/explained_variance"], metrics["critic/value_loss"])
                shown = {"loss": metrics["critic/value_loss"], "ev": metrics["critic/explained_variance"]}
                loop.log(metrics, count=len(share.batch), shown=shown, skipped={"critic": [not result.applied]})
                if fit.stopping_reason:
                    loop.end()
            if stage.runtime.is_main:
                say(f"value_pretrain: stopped after step {loop.step}: {fit.stopping_reason}")
    runtime.stop()


def learn_returns(
    critic: Critic,
    share: RolloutShare,
    packer: Packer,
    *,
    returns_config: ReturnsConfig,
    values_config: ValuesConfig,
    max_tokens: int,
) -> StepResult:
    """One optimizer step on ½(V - R)² with Monte-Carlo returns; the metrics are those of V before the step.

    returns_config: as in the PPO stage that follows, whose returns these are. max_tokens: the limit of a response.
    """
    rewards = episode_rewards(share.table, returns_config, max_tokens)
    returns = torch.empty(share.num_tokens)
    for block in share.blocks():
        block_rewards = token_rewards(rewards[block.rows], block.sampled)
        _, block_returns = decoupled_gae(
            rewards=block_rewards,
            values=torch.zeros_like(block_rewards),
            mask=block.sampled,
            gamma=returns_config.gamma,
            lam_actor=1.0,
            lam_critic=1.0,
        )
        returns[block.tokens] = block_returns[block.mask]
    mask = share.per_token(trained_rollouts(share.table, returns_config)) & share.sampled
    tensors = {"response_mask": mask, "returns": returns}
    microbatches = packer.pack(share.sequences(tensors), field_types(tensors))
    size = LossSize.of(share.batch, trained_rollouts(share.batch, returns_config), max_tokens)
    return critic.train_step(microbatches, CriticLoss(values_config, size.denominator("token")))


def step_metrics(result: StepResult, batch: RolloutTable, seconds: float) -> dict[str, float]:
    """The metrics of a step, as they are logged."""
    metrics = {f"critic/{name}": value for name, value in result.metrics.items()}
    metrics["critic/explained_variance"] = explained_variance(result.metrics)
    metrics |= {"critic/grad_norm": result.grad_norm, "critic/learning_rate": result.learning_rate}
    return metrics | reward_statistics(batch) | {"time/step_s": seconds}


class FitHistory:
    """How well the critic fit before each step so far, and whether that ends pretraining."""

    def __init__(self, settings: ValuePretrainConfig) -> None:
        self.settings = settings
        self.rows: list[list[float]] = []
        """(explained variance, value loss) per step."""

    def add(self, explained_variance: float, value_loss: float) -> None:
        """One more step."""
        self.rows.append([explained_variance, value_loss])

    @property
    def stopping_reason(self) -> str | None:
        """See ``stopping_reason``."""
        return stopping_reason(self.rows, self.settings)

    def state_dict(self) -> list[list[float]]:
        """All rows."""
        return [*self.rows]

    def load_state_dict(self, state: list[list[float]]) -> None:
        """Continue where ``state`` was taken."""
        self.rows = [*state]


def stopping_reason(history: list[list[float]], settings: ValuePretrainConfig) -> str | None:
    """Which rule ends pretraining after these (explained variance, value loss), as text; None: continue."""
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
