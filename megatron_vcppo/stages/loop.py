"""The one training loop: resume, the steps that are left, checkpoints, stops on request, the log.

A stage calls it explicitly, there are no hooks::

    loop = TrainLoop(stage, {"actor": actor}, total_steps, settings.checkpoint)
    loop.track(order=order)
    with loop:
        for step in loop:
            result = actor.train_step(...)
            loop.log(metrics, count=num_tokens, shown={"loss": loss}, skipped={"actor": [not result.applied]})

A step is one optimizer step or, in PPO, one iteration.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NoReturn, Protocol

from torch import Tensor

from megatron_vcppo.config import CheckpointConfig
from megatron_vcppo.errors import Stopped, UserError
from megatron_vcppo.mcore.checkpoint import CheckpointFolder
from megatron_vcppo.mcore.layers import unfused_attention
from megatron_vcppo.mcore.learner import Learner
from megatron_vcppo.run.events import startup
from megatron_vcppo.run.log import say
from megatron_vcppo.run.metrics_log import MetricsLog
from megatron_vcppo.run.progress import Progress
from megatron_vcppo.stages.rollout_session import RolloutSession
from megatron_vcppo.stages.speed import SpeedMeter
from megatron_vcppo.stages.stage import Stage
from megatron_vcppo.stages.stopping import Saved, stopping


@dataclass
class NonfiniteUpdates:
    """How many of the last steps of each model were skipped in a row; plain numbers, saved with the checkpoint."""

    limit: int
    in_a_row: dict[str, int] = field(default_factory=dict)
    """actor | critic → steps"""

    def count(self, skipped: Mapping[str, Sequence[bool]]) -> str:
        """Take in, per model, whether each step was skipped; returns what to warn about, "" if nothing was."""
        texts = []
        for who, steps in skipped.items():
            for one in steps:
                self.in_a_row[who] = self.in_a_row.get(who, 0) + 1 if one else 0
            if any(steps):
                texts.append(f"{sum(steps)} of {len(steps)} updates of the {who} ({self.in_a_row[who]} in a row)")
        return f"skipped {', '.join(texts)}: loss or gradient was not finite" if texts else ""

    @property
    def too_many(self) -> bool:
        """Whether the stage has to end."""
        return max(self.in_a_row.values(), default=0) >= self.limit

    def error(self, stage: str, saved_at: int) -> UserError:
        """What ends the stage."""
        who = max(self.in_a_row, key=lambda name: self.in_a_row[name])
        return UserError(
            f"{stage}: {self.in_a_row[who]} updates of the {who} in a row had a loss or gradient that was not finite "
            f"(run.skip_limit {self.limit}); saved at iteration {saved_at}. Lower its learning rate, or train in "
            "float32, and resume"
        )


class Stateful(Protocol):
    """A part of a stage's state besides its models, such as the position in the data."""

    def state_dict(self) -> Any:
        """What JSON can hold; not changed afterwards by the owner."""

    def load_state_dict(self, state: Any) -> None:
        """Continue where ``state`` was taken."""


class PartialStep(Protocol):
    """How far the step under way is, once its first optimizer steps have moved the weights."""

    @property
    def num_updates(self) -> int:
        """Optimizer steps so far, over all models."""

    def state_dict(self) -> dict[str, Any]:
        """What JSON can hold."""

    def tensors(self) -> dict[str, Tensor]:
        """What the rest of the step reads and moved weights no longer give: flat, on the CPU, of this replica."""


class PhaseTimer:
    """Seconds of each phase since the last ``take``."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Measure a part of the step. Parts of one name are added."""
        started = time.monotonic()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - started

    def take(self) -> dict[str, float]:
        """time/PHASE_s, and time/iteration_s: all the time since the last call. Starts again from zero."""
        found = {f"time/{phase}_s": seconds for phase, seconds in self.seconds.items()}
        found["time/iteration_s"] = time.monotonic() - self.started
        self.started, self.seconds = time.monotonic(), {}
        return found


class TrainLoop:
    """The steps of a stage. Iterating, entering and leaving are collective over all ranks.

    Leaving without an error marks the stage as done. Leaving with Stopped, which the body or the loop itself raises
    when any rank was asked to stop, saves what is not saved yet and raises Saved; the state that is saved is that of
    the last complete step.
    """

    def __init__(
        self,
        stage: Stage,
        learners: Mapping[str, Learner],
        total_steps: int,
        checkpoint: CheckpointConfig,
        *,
        session: RolloutSession | None = None,
        unit: str = "tok",
        step_name: str = "step",
    ) -> None:
        """Resume the learners from the stage's newest good checkpoint, if there is one.

        session: its rollouts are stored before a checkpoint, and pending ones kept at a stop. unit: what progress
        counts. step_name: step | iteration; an iteration is long, each gets a line of progress.
        """
        self.stage, self.learners, self.total_steps = stage, learners, total_steps
        self.session, self.unit, self.step_name = session, unit, step_name
        self.nonfinite = NonfiniteUpdates(stage.config.run.skip_limit)
        self.timer = PhaseTimer()
        self.partial: PartialStep | None = None
        """Of the step under way: what a stop within it saves."""
        self._resumed_updates = 0
        """Of the step under way, in the resumed checkpoint, until the step is taken up again."""
        self.checkpoints = CheckpointFolder(stage.folder.checkpoints, stage.config, checkpoint)
        self.resumed = self.checkpoints.resume(learners)
        self.step = 0
        """Complete steps."""
        if self.resumed is not None:
            self.step = self.resumed.iteration
            self.nonfinite.in_a_row = self.resumed.state.get("skipped_in_a_row", {})
        startup.done("checkpoint")
        self._tracked: dict[str, Stateful] = {}
        self._state: dict[str, Any] = {}
        """Of everything that is tracked, after the last complete step."""
        self._saved = self._reached
        """What is in the newest checkpoint; the start needs none."""
        self._ended = False
        self._log: MetricsLog | None = None
        self._progress: Progress | None = None
        self._is_first_log = True
        self._speed: SpeedMeter | None = None
        self._step_started = time.monotonic()

    def track(self, **parts: Stateful) -> None:
        """Make these a part of every checkpoint; they continue where the resumed one was."""
        for name, part in parts.items():
            # One from before a reward model was configured has no moments of its scores.
            if self.resumed is not None and name in self.resumed.state:
                part.load_state_dict(self.resumed.state[name])
        self._tracked |= parts

    def resume_within(self, num_updates: int) -> None:
        """The resumed checkpoint was saved within the next step, after this many optimizer steps of it; 0: no more."""
        self._resumed_updates, self.partial = num_updates, None
        if num_updates:
            self._saved = self._reached

    def __enter__(self) -> "TrainLoop":
        stage = self.stage
        self._state = self._current_state()
        if stage.runtime.is_main:
            every_s = 0.0 if self.step_name == "iteration" else 10.0
            self._log = MetricsLog(stage.folder.path, stage.config, stage.name, self.step, self.total_steps)
            self._speed = SpeedMeter(stage)
            self._progress = Progress(stage.name, self.total_steps, self.step, self.unit, every_s)
        return self

    def __iter__(self) -> Iterator[int]:
        """The numbers of the steps that are left, from 1. Raises Stopped on every rank if any was asked to stop,
        UserError after too many skipped updates."""
        self.timer.take()
        while not self._is_done:
            self._step_started = time.monotonic()
            yield self.step + 1
            self.step, self.partial = self.step + 1, None
            self._state = self._current_state()
            self._end_step()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Stopped):
            self._leave()
        if error is not None:
            return
        self.checkpoints.finish()
        if self._log is not None:
            self._log.close()
            if metric := self.checkpoints.unmeasured:
                say(
                    f"warning: no step logged {metric} (checkpoint.keep_best.metric): no checkpoint is kept as the best"
                )
            # More steps than total_steps were done if they were lowered before this resume.
            folder = self.stage.folder
            folder.mark_done(checkpoint=folder.checkpoint(self.step))

    def end(self) -> None:
        """No step after the one under way, or none at all before the first."""
        self._ended = True

    def point(self) -> None:
        """A place within a step where the stage can stop: raises Stopped if any rank was asked to; collective."""
        self.checkpoints.poll()
        stopping.point()

    @property
    def step_seconds(self) -> float:
        """Since the step began."""
        return time.monotonic() - self._step_started

    def log(
        self,
        metrics: Mapping[str, float],
        *,
        count: int,
        shown: Mapping[str, float],
        skipped: Mapping[str, Sequence[bool]],
    ) -> None:
        """Log the step, its last call; on every rank, of which the main one writes.

        metrics: with those of ``speed.work``, from which rates follow.
        count: how many of the loop's unit it worked through. shown: on the progress line. skipped: per model and
        optimizer step, whether loss or gradient was not finite.
        """
        self.checkpoints.note(self.step + 1, metrics)
        warning = self.nonfinite.count(skipped)
        if self._log is None or self._progress is None:
            return
        speed = self._speed.metrics(metrics, self.step_seconds) if self._speed else {}
        self._log.log(self.step + 1, {**metrics, **speed, **stopping.metrics(self.checkpoints.save_time_s)})
        startup.finish(self.stage.folder.path)
        if self._is_first_log and (slow := unfused_attention()):
            self.warn(slow)
        self._is_first_log = False
        self._progress.update(self.step + 1, count, shown)
        if warning:
            self.warn(warning)

    def warn(self, text: str) -> None:
        """Print a warning about the step under way, on the main rank."""
        if self.stage.runtime.is_main:
            say(f"warning: {self.step_name} {self.step + 1}: {text}")

    @property
    def _is_done(self) -> bool:
        return self._ended or self.step >= self.total_steps

    @property
    def _reached(self) -> tuple[int, int]:
        """Complete steps, and optimizer steps of the one under way."""
        return self.step, self.partial.num_updates if self.partial is not None else self._resumed_updates

    def _current_state(self) -> dict[str, Any]:
        state = {name: part.state_dict() for name, part in self._tracked.items()}
        return state | {"skipped_in_a_row": dict(self.nonfinite.in_a_row)}

    def _end_step(self) -> None:
        """Save when it is time, then end the stage if it has to end."""
        self.checkpoints.poll()
        stop, last = stopping.agreed(), self._is_done
        if last or self.nonfinite.too_many or self.checkpoints.is_due(self.step):
            self._save()
        if self.nonfinite.too_many:
            self.checkpoints.finish()
            raise self.nonfinite.error(self.stage.name, self.step)
        if stop and not last:
            raise Stopped

    def _save(self) -> None:
        """A checkpoint of the last complete step and of how far the next one is, after what they were trained on."""
        if self.session is not None:
            with self.timer("store"):
                self.session.batches.finish()
        state, tensors = dict(self._state), {}
        if self.partial is not None and self.partial.num_updates:
            state["unfinished"], tensors = self.partial.state_dict(), self.partial.tensors()
        with self.timer("save"), stopping.saving():
            self.checkpoints.save(self.step, self.learners, state, tensors)
        self._saved = self._reached

    def _leave(self) -> NoReturn:
        """Keep what there is, and raise Saved."""
        if self.session is not None:
            self.session.keep_finished()
        if self._reached != self._saved:
            self._save()
        self.checkpoints.finish()
        step, num_updates = self._reached
        where = f"at {self.step_name} {step} of {self.total_steps}"
        if num_updates:
            where = f"within {self.step_name} {step + 1} of {self.total_steps}, after {num_updates} optimizer steps"
        kept = "; finished responses are stored" if self.session is not None else ""
        raise Saved(f"asked to stop: saved {where}{kept}")
