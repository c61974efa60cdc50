"""PPO with decoupled GAE and a pretrained critic: the iteration of VC-PPO (arXiv 2503.01491, Algorithm 1)."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from megatron_vcppo.algo.failure_signatures import warnings_of
from megatron_vcppo.algo.kl import next_kl_coef
from megatron_vcppo.algo.masked import check_finite
from megatron_vcppo.config import Config
from megatron_vcppo.data.prompts import PromptStream
from megatron_vcppo.data.rollout_batch import RolloutBatch, make_batch
from megatron_vcppo.errors import Stopped, UserError
from megatron_vcppo.mcore import runtime
from megatron_vcppo.mcore.checkpoint import CheckpointFolder, complete_checkpoints
from megatron_vcppo.mcore.hf_weights_io import stream_hf
from megatron_vcppo.mcore.learner import Actor, Critic, Learner, Reference
from megatron_vcppo.records import Rollout
from megatron_vcppo.report.run_data import worst_reward
from megatron_vcppo.rollout.seeds import training_sampling
from megatron_vcppo.run.metrics_log import MetricsLog, cut_back, read_history
from megatron_vcppo.run.progress import Progress
from megatron_vcppo.run.startup import startup
from megatron_vcppo.stages.advantage_batch import END_OF_THINKING, compute_advantages
from megatron_vcppo.stages.held_out import evaluate_engines
from megatron_vcppo.stages.initial_models import continue_pretraining, starting_actor, starting_critic
from megatron_vcppo.stages.nonfinite import NonfiniteUpdates
from megatron_vcppo.stages.prompt_sampler import PromptSampler
from megatron_vcppo.stages.provenance import claim, origin_of
from megatron_vcppo.stages.rollout_session import RolloutSession
from megatron_vcppo.stages.stage import mark_done, packer_of, stage_folder
from megatron_vcppo.stages.stopping import Saved, stopping
from megatron_vcppo.stages.token_outputs import token_outputs
from megatron_vcppo.stages.training_losses import bounded
from megatron_vcppo.stages.unfinished import Unfinished
from megatron_vcppo.stages.updates import UpdateMetrics, update
from megatron_vcppo.weight_sync.sync import PushResult


def run(config: Config) -> None:
    """Train the actor on verified rewards; leaves RUN/ppo/checkpoints. Raises Saved if asked to stop."""
    folder = stage_folder(config, "ppo")
    world = runtime.start(config.parallel, config.run.seed, config.run.timeout_s)
    startup.done("groups")
    with RolloutSession(config, folder, world) as generation:
        generation.start_engines()
        ppo = Ppo(config, folder, world, generation)
        try:
            ppo.train()
        except Stopped:
            ppo.leave()
    if world.is_main:
        mark_done(folder, checkpoint=folder / "checkpoints" / f"iter_{config.ppo.iterations:07d}")
    runtime.stop()


class Ppo:
    """The state of the stage, and the iteration that changes it."""

    def __init__(self, config: Config, folder: Path, world: runtime.Runtime, generation: RolloutSession) -> None:
        settings = config.ppo
        self.config, self.settings, self.folder, self.world = config, settings, folder, world
        self.generation, self.packing = generation, packer_of(config, world)
        steps_per_iteration = settings.ppo_epochs * settings.minibatches
        actor_steps = max(0, settings.iterations - settings.critic_only_iterations) * steps_per_iteration
        model = starting_actor(config, "ppo")
        self.actor = Actor(
            model,
            config.parallel,
            settings.optimizer,
            settings.schedule,
            actor_steps,
            temperature=config.rollout.temperature,
        )
        self.critic: Critic | None = None
        if settings.advantage.baseline == "critic":
            critic = starting_critic(config, "ppo", settings.critic.init, settings.critic.checkpoint_path)
            critic_steps = settings.iterations * steps_per_iteration * settings.critic.updates_per_actor_update
            self.critic = Critic(
                critic, config.parallel, settings.critic.optimizer, settings.critic.schedule, critic_steps
            )
        self.reference = None
        if settings.loss.kl_coef:
            self.reference = Reference(starting_actor(config, "ppo"), config.rollout.temperature)
        generation.share(self.actor, self.critic, self.reference)
        self.learners: dict[str, Learner] = {"actor": self.actor}
        if self.critic is not None:
            self.learners["critic"] = self.critic

        startup.done("model")
        self.stream = PromptStream(generation.prompts(config.prompts.train), config.run.seed)
        self.sampler = PromptSampler(config, generation, self.stream, training_sampling(config.rollout))
        startup.done("data")
        self.kl_coef, self.skips, self.iteration = settings.loss.kl_coef, NonfiniteUpdates(settings.skip_limit), 0
        self.checkpoints = CheckpointFolder(folder / "checkpoints", config, settings.checkpoint)
        self.update_under_way: tuple[RolloutBatch, dict[str, Tensor], UpdateMetrics] | None = None
        self.unfinished: Unfinished | None = None
        """Of the checkpoint, until its iteration is taken up."""
        resumed = self.checkpoints.resume(self.learners)
        if resumed is None and self.critic is not None:
            continue_pretraining(self.critic, config)
        if resumed is not None:
            self.iteration = resumed.iteration
            self.stream.load_state_dict(resumed.state["prompts"])
            self.kl_coef = resumed.state["kl_coef"]
            self.skips.in_a_row = resumed.state["skipped_in_a_row"]
            if "unfinished" in resumed.state:
                self.unfinished = Unfinished.from_checkpoint(resumed.state["unfinished"], resumed.tensors)
        self.place = self.stream.state_dict()
        """In the prompt stream before the iteration that is next or under way: where a resume continues."""
        self.saved = (self.iteration, self.unfinished.num_steps if self.unfinished else 0)
        """Iterations and optimizer steps of the next one in the newest checkpoint; (0, 0) needs none."""
        startup.done("checkpoint")
        if world.is_main:
            claim(generation.rollouts, origin_of(config, "ppo"), self.sampler.last_tag(self.iteration))
        self.end_of_thinking_id = generation.tokenizer.get_vocab().get(END_OF_THINKING)
        self.seconds: dict[str, float] = {}
        """Since the iteration before was logged: saving it counts to the next one."""

    def train(self) -> None:
        """All iterations that are left. Raises Stopped on every rank if any was asked to stop."""
        total = self.settings.iterations
        log = MetricsLog(self.folder, self.config, "ppo", self.iteration, total) if self.world.is_main else None
        progress = Progress("ppo", total, self.iteration, "tok", every_s=0) if self.world.is_main else None
        history = read_history(self.folder) if log is not None else []
        if log is not None:
            cut_back(self.folder / "profiles.jsonl", self.iteration)
        self.generation.wait_for_engines()
        started = time.monotonic()
        while self.iteration < total:
            metrics, profiles, warning = self.iterate()
            metrics |= {f"time/{name}_s": seconds for name, seconds in self.seconds.items()}
            metrics["time/iteration_s"], started = time.monotonic() - started, time.monotonic()
            self.seconds = {}
            if log is not None and progress is not None:
                log.log(self.iteration, metrics | stopping.metrics(self.checkpoints.save_time_s))
                startup.finish(self.folder)
                with open(self.folder / "profiles.jsonl", "a", encoding="utf-8") as file:
                    file.write(json.dumps({"iteration": self.iteration, **profiles}) + "\n")
                progress.update(self.iteration, int(metrics["rollout/tokens"]), shown(metrics))
                history.append({"iteration": self.iteration, **metrics})
                for text in filter(None, [warning, *warnings_of(history, worst_reward(asdict(self.config)))]):
                    print(f"warning: iteration {self.iteration}: {text}", flush=True)
            self.save_or_stop(last=self.iteration == total)
        self.checkpoints.finish()
        if log is not None and progress is not None:
            log.close()
            progress.close()

    def iterate(self) -> tuple[dict[str, float], dict[str, list[float | None]], str]:
        """One iteration: rollouts, values, advantages, updates. Returns metrics, profiles, and what to warn about.

        Raises Stopped at any ``point``; ``leave`` then saves how far it is.
        """
        config, iteration = self.config, self.iteration + 1
        self.point()
        rollouts, push = self.rollouts_and_push(iteration)
        batch = make_batch(rollouts)
        fields, report = self.outputs_and_report(batch)
        with self.phase("advantages"):
            credit = compute_advantages(
                batch,
                fields.get("values"),
                fields["old_logprobs"],
                fields.get("ref_logprobs"),
                config,
                self.kl_coef,
                self.end_of_thinking_id,
            )
        critic_only = iteration <= self.settings.critic_only_iterations
        self.update_under_way = batch, fields, report
        with self.phase("update"):
            kl_coef = self.kl_coef if self.settings.loss.kl_in == "loss" else 0.0
            update(
                *(None if critic_only else self.actor, self.critic, batch, credit, fields, self.packing, config),
                *(iteration, kl_coef, report, self.point),
            )
        metrics = {**credit.metrics, **report.means(), "rollout/tokens": float(batch.lengths.sum())}
        if self.settings.evaluate_every and iteration % self.settings.evaluate_every == 0:
            self.point()
            with self.phase("generation"):
                self.sampler.settle()
            push = self.push(iteration)
            with self.phase("evaluation"):
                metrics |= evaluate_engines(config, self.generation, iteration)
                self.generation.trainer_turn()
        metrics["weight_sync/pause_s"], metrics["weight_sync/mb"] = push.pause_s, push.num_bytes / 1e6
        # Last, so that what a stop saves before is the state before the iteration, and how far it is.
        self.iteration, self.place, self.update_under_way = iteration, self.sampler.state_dict(), None
        self.adapt_kl(metrics, len(batch))
        return metrics, credit.profiles, self.skips.count(report.skipped)

    def outputs_and_report(self, batch: RolloutBatch) -> tuple[dict[str, Tensor], UpdateMetrics]:
        """What the losses need from before the update, by name [B, T], and the report of the update so far.

        Both are the checkpoint's if it was saved within the update of these rollouts.
        """
        unfinished, self.unfinished = self.unfinished, None
        if unfinished is not None and unfinished.fits(batch, self.config):
            return unfinished.fields(batch), UpdateMetrics.from_state(unfinished.report)
        if unfinished is not None and self.world.is_main:
            print(
                f"note: iteration {self.iteration + 1} was interrupted after {unfinished.num_steps} optimizer steps on "
                "other rollouts or under other settings: it begins again, with the weights of these steps",
                flush=True,
            )
        self.point()
        with self.phase("logprobs"):
            fields = {
                "old_logprobs": token_outputs(batch, self.packing, self.actor.logprobs),
                "rollout_logprobs": batch.rollout_logprobs,
            }
            if self.reference is not None:
                self.point()
                fields["ref_logprobs"] = token_outputs(batch, self.packing, self.reference.logprobs)
        if self.critic is not None:
            self.point()
            with self.phase("values"):
                values = token_outputs(batch, self.packing, self.critic.values)
                fields["values"] = bounded(values, self.settings.critic)
        if self.config.run.check_numerics:
            self.check_outputs(batch.response_mask, fields)
        return fields, UpdateMetrics()

    def rollouts_and_push(self, iteration: int) -> tuple[list[Rollout], PushResult]:
        """The batch of this iteration, and the actor's weights in the engines.

        With staleness 1 the batch was generated during the iteration before, by the actor from before its update, and
        now the next one is begun. The first iteration, and the first after a resume, have nothing to take: their batch
        is generated by the actor of now.
        """
        if self.sampler.ahead is not None:
            with self.phase("generation"):
                rollouts = self.sampler.take(iteration)
            push = self.push(self.iteration)
        else:
            push = self.push(self.iteration)
            with self.phase("generation"):
                rollouts = self.sampler.take(iteration)
                self.generation.trainer_turn()
        if self.settings.staleness and iteration < self.settings.iterations:
            self.sampler.begin(iteration + 1)
        return rollouts, push

    def push(self, policy_version: int) -> PushResult:
        """Give the engines the actor's weights."""
        with self.phase("sync"):
            model = self.actor.gathered_model()
            return self.generation.push(policy_version, lambda: stream_hf(model))

    def check_outputs(self, mask: Tensor, fields: dict[str, Tensor]) -> None:
        """Updates that are not finite are skipped, so what is not finite here comes from weights out of range."""
        try:
            check_finite(mask, **fields)
        except FloatingPointError as error:
            saved = max((path.name for path in complete_checkpoints(self.checkpoints.folder)), default="none")
            raise UserError(
                f"ppo: iteration {self.iteration + 1}: {error}. The newest checkpoint is {saved}; lower "
                "ppo.optimizer.lr or ppo.critic.optimizer.lr and resume"
            ) from None

    def adapt_kl(self, metrics: dict[str, float], num_rollouts: int) -> None:
        """Move the coefficient towards the target divergence."""
        loss = self.settings.loss
        if self.reference is None:
            return
        metrics["actor/kl_coef"] = self.kl_coef
        if loss.kl_target is not None and "actor/kl_ref" in metrics:
            self.kl_coef = next_kl_coef(
                self.kl_coef,
                observed_kl=metrics["actor/kl_ref"],
                target_kl=loss.kl_target,
                num_rollouts=num_rollouts,
                horizon=loss.kl_horizon,
            )

    def point(self) -> None:
        """Raise Stopped if any rank was asked to stop; collective."""
        self.checkpoints.poll()
        stopping.point()

    @property
    def reached(self) -> tuple[int, int]:
        """Iterations that are done, and optimizer steps of the one under way."""
        if self.unfinished is not None:  # nothing has changed since the checkpoint
            return self.saved
        return self.iteration, self.update_under_way[2].num_all_steps if self.update_under_way else 0

    def save(self) -> None:
        """A checkpoint of this iteration, or of how far the next one is."""
        state: dict[str, Any] = {
            "prompts": self.place,
            "kl_coef": self.kl_coef,
            "skipped_in_a_row": self.skips.in_a_row,
        }
        tensors: dict[str, Tensor] = {}
        if self.update_under_way is not None and self.reached[1]:
            unfinished = Unfinished.of(*self.update_under_way, self.config)
            state["unfinished"], tensors = unfinished.state_dict(), unfinished.tensors
        with self.phase("save"), stopping.saving():
            self.checkpoints.save(self.iteration, self.learners, state, tensors)
        self.saved = self.reached

    def leave(self) -> NoReturn:
        """Keep what there is of the iteration under way, and of one begun ahead, and raise Saved; collective."""
        self.generation.keep_finished()
        if self.reached != self.saved:
            self.save()
        self.checkpoints.finish()
        total, (iteration, num_steps) = self.settings.iterations, self.reached
        where = f"at iteration {iteration} of {total}"
        if num_steps:
            where = f"within iteration {iteration + 1} of {total}, after {num_steps} optimizer steps"
        raise Saved(f"asked to stop: saved {where}; finished responses are stored")

    def save_or_stop(self, last: bool) -> None:
        """Save when it is time; raise Stopped if any rank was asked to, UserError after too many skipped updates."""
        self.checkpoints.poll()
        stop = stopping.agreed()
        if last or self.skips.too_many or self.iteration % self.settings.checkpoint.save_every == 0:
            self.save()
        if self.skips.too_many:
            self.checkpoints.finish()
            raise self.skips.error("ppo", self.iteration)
        if stop and not last:
            raise Stopped

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure a part of the iteration."""
        started = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started


def shown(metrics: dict[str, float]) -> dict[str, float]:
    """What the progress line shows of an iteration: how it went, and the seconds of each phase."""
    names = {
        "reward": "rollout/reward_mean",
        "pass@1": "rollout/accuracy",
        "length": "rollout/length_mean",
        "ev": "critic/explained_variance",
        "kl": "actor/approx_kl",
        "gap": "rollout/logprob_gap",
        "held_out": "evaluation/avg",
    }
    found = {short: metrics[name] for short, name in names.items() if name in metrics}
    phases = {name[5:]: value for name, value in metrics.items() if name.startswith("time/")}
    return found | {name: phases[name] for name in (*sorted(phases.keys() - {"iteration_s"}), "iteration_s")}
