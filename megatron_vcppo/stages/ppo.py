"""PPO with decoupled GAE and a pretrained critic: the iteration of VC-PPO (arXiv 2503.01491, Algorithm 1)."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from megatron_vcppo.algo.kl import next_kl_coef
from megatron_vcppo.algo.masked import check_finite
from megatron_vcppo.config import Config, PolicyLossConfig
from megatron_vcppo.data.packing import PackedMicrobatch
from megatron_vcppo.data.rollout_share import ModelOutputs, RolloutShare
from megatron_vcppo.errors import UserError
from megatron_vcppo.mcore import runtime
from megatron_vcppo.mcore.checkpoint import complete_checkpoints
from megatron_vcppo.records import RolloutPart
from megatron_vcppo.run.events import startup
from megatron_vcppo.run.folder import iteration_of
from megatron_vcppo.run.log import say
from megatron_vcppo.run.rollout_store import claim, drop_experts
from megatron_vcppo.stages.advantage_batch import END_OF_THINKING, compute_advantages
from megatron_vcppo.stages.group_queue import age_metrics
from megatron_vcppo.stages.held_out import evaluate_engines
from megatron_vcppo.stages.initial_models import continue_pretraining
from megatron_vcppo.stages.iteration_report import IterationReport, shown
from megatron_vcppo.stages.loop import TrainLoop
from megatron_vcppo.stages.model_rewards import ModelRewards, tracked
from megatron_vcppo.stages.ppo_models import PpoModels, push_actor, token_outputs
from megatron_vcppo.stages.prompt_sampler import PromptSampler
from megatron_vcppo.stages.provenance import origin_of
from megatron_vcppo.stages.rollout_session import RolloutSession
from megatron_vcppo.stages.share_exchange import experts_format, share_out
from megatron_vcppo.stages.speed import work
from megatron_vcppo.stages.stage import Stage, start_stage
from megatron_vcppo.stages.training_losses import bounded
from megatron_vcppo.stages.unfinished import Unfinished, UpdateUnderWay
from megatron_vcppo.stages.updates import UpdateMetrics, Updater
from megatron_vcppo.weight_sync.sync import PushResult


def run(config: Config) -> None:
    """Train the actor on verified rewards; leaves RUN/ppo/checkpoints. Raises Saved if asked to stop."""
    stage = start_stage(config, "ppo")
    with RolloutSession(stage) as session:
        session.start_engines()
        models = PpoModels(config)
        session.share(models.actor, models.critic, models.reference)
        startup.done("model")
        stream = session.training_prompts(config.run.seed)
        model_rewards = ModelRewards.of(stage, session)
        score = model_rewards.score if model_rewards is not None else None
        sampler = PromptSampler(config, session, stream, score)
        startup.done("data")
        kl = KlCoefficient(config.ppo.loss)
        loop = TrainLoop(
            stage,
            models.learners,
            config.ppo.iterations,
            config.ppo.checkpoint,
            session=session,
            step_name="iteration",
        )
        loop.track(prompts=sampler, kl_coef=kl, **tracked(model_rewards))
        if loop.resumed is None and models.critic is not None:
            continue_pretraining(models.critic, config)
        if stage.runtime.is_main:
            claim(session.batches.folder, origin_of(config, "ppo"), sampler.last_number(loop.step))
        ppo = Ppo(stage, session, models, sampler, kl, loop, model_rewards)
        with loop:
            report = IterationReport(stage, loop)
            session.wait_for_engines()
            for iteration in loop:
                metrics, profiles, skipped = ppo.iterate(iteration)
                num_tokens = int(metrics["rollout/tokens"])
                loop.log(metrics, count=num_tokens, shown=shown(metrics), skipped=skipped)
                report.add(iteration, metrics, profiles)
    runtime.stop()


class KlCoefficient:
    """What a nat of divergence from the reference costs; follows a target divergence if there is one."""

    def __init__(self, config: PolicyLossConfig) -> None:
        self.config, self.value = config, config.kl_coef

    def adapt(self, metrics: Mapping[str, float], num_rollouts: int) -> None:
        """Move the coefficient towards the target divergence, given an iteration's metrics."""
        target = self.config.kl_target
        if target is not None and "actor/kl_ref" in metrics:
            self.value = next_kl_coef(
                self.value,
                observed_kl=metrics["actor/kl_ref"],
                target_kl=target,
                num_rollouts=num_rollouts,
                horizon=self.config.kl_horizon,
            )

    def state_dict(self) -> float:
        """The coefficient."""
        return self.value

    def load_state_dict(self, state: float) -> None:
        """Continue with it."""
        self.value = state


class Ppo:
    """The iteration, and what it works with."""

    def __init__(
        self,
        stage: Stage,
        session: RolloutSession,
        models: PpoModels,
        sampler: PromptSampler,
        kl: KlCoefficient,
        loop: TrainLoop,
        model_rewards: ModelRewards | None = None,
    ) -> None:
        config = stage.config
        self.model_rewards = model_rewards
        self.config, self.packer = config, stage.packer
        self.session, self.models, self.sampler, self.kl, self.loop = session, models, sampler, kl, loop
        self.updater = Updater(
            actor=models.actor,
            critic=models.critic,
            packer=stage.packer,
            config=config.ppo,
            values_config=config.values,
            returns_config=config.returns,
            run_seed=config.run.seed,
            max_tokens=config.rollout.max_tokens,
        )
        critic_updates = config.ppo.critic.updates_per_actor_update if models.critic is not None else 0
        forward_passes = (config.ppo.loss.kind == "clip") + (models.reference is not None) + (models.critic is not None)
        self.passes = config.ppo.ppo_epochs * (1 + critic_updates) + forward_passes / 3
        """Of a model over the batch, forward and backward."""
        self.unfinished: Unfinished | None = None
        """Of the resumed checkpoint, until its iteration is taken up."""
        if loop.resumed is not None and "unfinished" in loop.resumed.state:
            self.unfinished = Unfinished.from_checkpoint(loop.resumed.state["unfinished"], loop.resumed.tensor_files)
            loop.resume_within(self.unfinished.num_updates)
        self.experts = experts_format(models.actor.model.arch) if config.ppo.routing_replay else None
        """Of those that engines chose, with routing replay."""
        self.end_of_thinking_id = session.tokenizer.get_vocab().get(END_OF_THINKING)

    def iterate(self, iteration: int) -> tuple[dict[str, float], dict[str, list[float | None]], dict[str, list[bool]]]:
        """One iteration: rollouts, values, advantages, updates.

        Returns metrics, profiles by position, and which optimizer steps were skipped. Raises Stopped at any
        ``loop.point``; the loop then saves how far it is.
        """
        loop, config = self.loop, self.config
        loop.point()
        rollouts, push = self.rollouts_and_push(iteration)
        with loop.timer("exchange"):
            share = share_out(rollouts, self.experts)
        reward_metrics: dict[str, float] = {}
        if self.model_rewards is not None:
            share, reward_metrics = self.model_rewards.add_to(share)
        resumed = self.take_unfinished(rollouts, share)
        ages = age_metrics(rollouts, share.batch, policy_version=iteration - 1)
        del rollouts
        if resumed is None:
            old_logprobs = self.old_logprobs(share)
            ref_logprobs = self.ref_logprobs(share)
            values = self.values(share)
            outputs = ModelOutputs(old_logprobs, share.rollout_logprobs, ref_logprobs, values)
            self.check_outputs(outputs)
            update_metrics = UpdateMetrics()
        else:
            outputs, update_metrics = resumed.outputs(share), UpdateMetrics.from_state(resumed.metrics)
        with loop.timer("advantages"):
            advantages = compute_advantages(
                share,
                outputs,
                config.ppo.advantage,
                config.ppo.loss,
                returns_config=config.returns,
                kl_coef=self.kl.value,
                max_tokens=config.rollout.max_tokens,
                end_of_thinking_id=self.end_of_thinking_id,
            )
        loop.partial = UpdateUnderWay(share, outputs, update_metrics, config.ppo, config.run.seed)
        with loop.timer("update"):
            self.updater.update(
                share,
                advantages,
                outputs,
                iteration=iteration,
                kl_coef=self.kl.value,
                metrics=update_metrics,
                before_step=loop.point,
            )
        evaluation, push = self.evaluate(iteration, push)
        metrics = {
            **advantages.metrics,
            **update_metrics.means(),
            **reward_metrics,
            **ages,
            "rollout/tokens": float(share.batch.lengths.sum() - share.batch.rows["trained_length"].sum()),
            **work(loop.stage, share.batch.sequence_lengths, self.passes),
            **evaluation,
            "weight_sync/pause_s": push.pause_s,
            "weight_sync/mb": push.num_bytes / 1e6,
            **({"actor/kl_coef": self.kl.value} if self.models.reference is not None else {}),
        }
        self.kl.adapt(metrics, len(share.batch))
        return metrics | loop.timer.take(), advantages.profiles, update_metrics.skipped

    def rollouts_and_push(self, iteration: int) -> tuple[RolloutPart, PushResult]:
        """What this rank has of the iteration's batch, and the actor's weights in the engines.

        With staleness engines have worked on it, and on later ones, since iterations before, under their weights; what
        is still running continues under these (``weight_sync.pause``).
        """
        push = self.push(iteration - 1)
        with self.loop.timer("generation"):
            rollouts = self.sampler.next_batch(iteration)
            self.session.trainer_turn()
        self.drop_experts()
        return rollouts, push

    def drop_experts(self) -> None:
        """Remove stored experts of iterations that no resume trains again, or continues in further windows."""
        done = [iteration_of(path.name) or 0 for path in complete_checkpoints(self.loop.checkpoints.folder)]
        if self.experts is not None and self.session.runtime.is_main and done:
            continued = self.config.ppo.window_tokens is not None
            drop_experts(self.session.batches.folder, self.sampler.last_number(min(done)) - continued)

    def push(self, policy_version: int) -> PushResult:
        """Give the engines the actor's weights."""
        with self.loop.timer("generation"):
            self.sampler.before_push()
        with self.loop.timer("sync"):
            return push_actor(self.models.actor, self.session, policy_version)

    def take_unfinished(self, part: RolloutPart, share: RolloutShare) -> Unfinished | None:
        """What the checkpoint has of the update of these rollouts, if it was saved within it."""
        unfinished, self.unfinished = self.unfinished, None
        self.loop.resume_within(0)
        if unfinished is None:
            return None
        if unfinished.fits(part, share, self.config.ppo, self.config.run.seed):
            return unfinished
        if self.session.runtime.is_main:
            say(
                f"note: iteration {self.loop.step + 1} was interrupted after {unfinished.num_updates} optimizer steps "
                "on other rollouts or under other settings: it begins again, with the weights of these steps"
            )
        return None

    def outputs(
        self,
        share: RolloutShare,
        phase: str,
        run: Callable[[Sequence[PackedMicrobatch]], list[Tensor]],
        *,
        replays_routing: bool = False,
    ) -> Tensor:
        """A model's outputs for a share, [N]; a point at which the stage can stop comes first."""
        self.loop.point()
        with self.loop.timer(phase):
            return token_outputs(share, self.packer, run, replays_routing=replays_routing)

    def old_logprobs(self, share: RolloutShare) -> Tensor | None:
        """Of the actor before its update, [N]; None if the loss compares with the engines' log-probs."""
        if self.config.ppo.loss.kind == "dis":
            return None
        return self.outputs(share, "logprobs", self.models.actor.logprobs, replays_routing=True)

    def ref_logprobs(self, share: RolloutShare) -> Tensor | None:
        """Of the frozen reference, [N]; None if there is none."""
        reference = self.models.reference
        return None if reference is None else self.outputs(share, "logprobs", reference.logprobs)

    def values(self, share: RolloutShare) -> Tensor | None:
        """Of the critic, [N], within its bounds; None if there is none."""
        critic = self.models.critic
        if critic is None:
            return None
        return bounded(self.outputs(share, "values", critic.values), self.config.values)

    def check_outputs(self, outputs: ModelOutputs) -> None:
        """Raise UserError on every rank for a non-finite output of any replica.

        Non-finite updates are skipped, so a non-finite output here means that the weights themselves have diverged.
        """
        found = ""
        try:
            check_finite(torch.ones_like(outputs.rollout_logprobs, dtype=torch.bool), **outputs.by_name())
        except FloatingPointError as error:
            found = str(error)
        if runtime.any_rank(bool(found)):
            saved = max((path.name for path in complete_checkpoints(self.loop.checkpoints.folder)), default="none")
            raise UserError(
                f"ppo: iteration {self.loop.step + 1}: {found or 'not finite on another replica'}. The newest "
                f"checkpoint is {saved}; lower ppo.optimizer.lr or ppo.critic.optimizer.lr and resume"
            )

    def evaluate(self, iteration: int, push: PushResult) -> tuple[dict[str, float], PushResult]:
        """Metrics of the updated actor on held-out problems when it is time, and the last push."""
        every = self.config.ppo.evaluate_every
        if not every or iteration % every:
            return {}, push
        self.loop.point()
        push = self.push(iteration)
        with self.loop.timer("evaluation"):
            metrics = evaluate_engines(self.config, self.session, iteration)
            self.session.trainer_turn()
        return metrics, push
