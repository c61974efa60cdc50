"""The training loop by itself: when it saves, how it stops, what a resume continues with."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_vcppo.config import CheckpointConfig, Config
from megatron_vcppo.errors import Stopped, UserError
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.mcore.checkpoint import Resumed
from megatron_vcppo.run.folder import StageFolder
from megatron_vcppo.run.metrics_log import read_metrics
from megatron_vcppo.stages import loop as loop_module
from megatron_vcppo.stages.loop import TrainLoop
from megatron_vcppo.stages.speed import TFLOP, TOKENS, SpeedMeter, work
from megatron_vcppo.stages.stage import Stage
from megatron_vcppo.stages.stopping import Saved, Stopping
from tools.benchmarks._tiny_chains import tiny_model


@dataclass
class Checkpoints:
    """In memory; takes the place of CheckpointFolder."""

    resumed: Resumed | None = None
    saves: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    save_time_s: float = 0.0
    noted: list[int] = field(default_factory=list)
    unmeasured: str | None = None

    def is_due(self, iteration: int) -> bool:
        return iteration % 2 == 0

    def note(self, iteration: int, metrics: Any) -> None:
        self.noted.append(iteration)

    def resume(self, components: Any) -> Resumed | None:
        return self.resumed

    def save(self, iteration: int, components: Any, state: dict[str, Any], tensors: Any) -> None:
        self.saves.append((iteration, state))

    def poll(self) -> None:
        """Nothing is in the background."""

    finish = poll


class Counter:
    """A part of the state."""

    def __init__(self) -> None:
        self.value = 0

    def state_dict(self) -> int:
        return self.value

    def load_state_dict(self, state: int) -> None:
        self.value = state


class Request(Stopping):
    """On one rank without a group; ``when`` is looked at at every point."""

    def __init__(self, when: Callable[[], bool]) -> None:
        super().__init__()
        self.when = when

    def agreed(self) -> bool:
        return self.when()


@dataclass
class Run:
    """Steps of a loop over a counter, with a fake of everything that needs a model."""

    folder: StageFolder
    monkeypatch: pytest.MonkeyPatch
    counter: Counter = field(default_factory=Counter)
    done: list[int] = field(default_factory=list)

    def __call__(
        self,
        checkpoints: Checkpoints,
        total: int = 5,
        stop: Callable[[], bool] = lambda: False,
        body: Callable[[TrainLoop, int], None] = lambda loop, step: None,
        skipped: bool = False,
        session: Any = None,
    ) -> None:
        config = Config()
        config.run.skip_limit = 2
        self.monkeypatch.setattr(loop_module, "CheckpointFolder", lambda *_: checkpoints)
        self.monkeypatch.setattr(loop_module, "stopping", Request(stop))
        self.monkeypatch.setattr(
            StageFolder, "mark_done", lambda _, checkpoint: self.done.append(int(checkpoint.name[-7:]))
        )
        main: Any = SimpleNamespace(is_main=True, world_size=2, device=torch.device("cpu"))
        loop = TrainLoop(Stage(config, self.folder, main), {}, total, CheckpointConfig(), session=session)
        loop.track(count=self.counter)
        with loop:
            for step in loop:
                self.counter.value += 10
                body(loop, step)
                metrics = {"x": 1.0, TOKENS: 600.0, TFLOP: 0.5}
                loop.log(metrics, count=1, shown={}, skipped={"actor": [skipped]})


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(StageFolder(tmp_path / "sft").make(), monkeypatch)


def counts(checkpoints: Checkpoints) -> list[tuple[int, int]]:
    return [(iteration, state["count"]) for iteration, state in checkpoints.saves]


def test_every_step_logs_how_fast_it_was(run: Run) -> None:
    run(Checkpoints())
    for record in read_metrics(run.folder.path):
        assert record["speed/tokens_per_s"] == pytest.approx(2 * record["speed/tokens_per_s_per_rank"])
        assert record["speed/peak_memory_gib"] > 0.01 and record["speed/mfu"] > 0


def test_rates_follow_from_work_and_seconds(tmp_path: Path) -> None:
    config, runtime = Config(), SimpleNamespace(world_size=4, device=torch.device("cpu"))
    config.model.hf = str(tiny_model(tmp_path))
    stage: Any = SimpleNamespace(config=config, runtime=runtime)
    once, twice = work(stage, [10, 30]), work(stage, [10, 30], passes=2)
    assert once[TOKENS] == twice[TOKENS] == 40 and twice[TFLOP] == pytest.approx(2 * once[TFLOP])
    assert once[TFLOP] == Architecture.from_hf(config.model.hf).training_flops([10, 30]) / 1e12
    meter = SpeedMeter(stage)
    meter.peak = 0.5
    found = meter.metrics({TOKENS: 600.0, TFLOP: 3.0}, seconds=2.0)
    assert (found["speed/tokens_per_s"], found["speed/tokens_per_s_per_rank"]) == (300, 75)
    assert found["speed/mfu"] == pytest.approx(3.0 / 2.0 / (0.5 * 4))
    meter.peak = None
    assert "speed/mfu" not in meter.metrics({TOKENS: 1.0, TFLOP: 1.0}, 1.0), "a GPU of which no peak is known"


def test_it_saves_at_boundaries_and_at_the_end(run: Run) -> None:
    checkpoints = Checkpoints()
    run(checkpoints)
    assert counts(checkpoints) == [(2, 20), (4, 40), (5, 50)] and run.done == [5]
    assert [record["iteration"] for record in read_metrics(run.folder.path)] == [1, 2, 3, 4, 5] == checkpoints.noted


def test_a_metric_of_the_best_that_no_step_had_is_reported_at_the_end(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run(Checkpoints(unmeasured="evaluation/avg"))
    assert "warning: no step logged evaluation/avg (checkpoint.keep_best.metric)" in capsys.readouterr().out


def test_rollouts_are_stored_before_a_checkpoint_of_what_was_trained_on_them(run: Run) -> None:
    stored: list[int] = []
    checkpoints = Checkpoints()
    session = SimpleNamespace(batches=SimpleNamespace(finish=lambda: stored.append(len(checkpoints.saves))))
    run(checkpoints, session=session)
    assert stored == [0, 1, 2] and len(checkpoints.saves) == 3


def test_a_resume_continues_after_the_last_complete_step(run: Run) -> None:
    checkpoints = Checkpoints(Resumed(4, {"count": 40, "skipped_in_a_row": {"actor": 1}}, ()))
    run(checkpoints)
    assert counts(checkpoints) == [(5, 50)] and run.done == [5]


def test_a_part_that_the_checkpoint_does_not_know_starts_new(run: Run) -> None:
    """A reward model that is configured before a resume."""
    checkpoints = Checkpoints(Resumed(4, {}, ()))
    run(checkpoints)
    assert counts(checkpoints) == [(5, 10)]


def test_a_stage_whose_steps_were_lowered_is_done_with_what_it_has(run: Run) -> None:
    checkpoints = Checkpoints(Resumed(4, {"count": 40}, ()))
    run(checkpoints, total=3)
    assert checkpoints.saves == [] and run.done == [4]


@pytest.mark.parametrize(("step", "expected"), [(3, [(2, 20), (3, 30)]), (4, [(2, 20), (4, 40)])])
def test_a_stop_between_steps_saves_once(run: Run, step: int, expected: list[tuple[int, int]]) -> None:
    checkpoints = Checkpoints()
    with pytest.raises(Saved, match=f"saved at step {step} of 5"):
        run(checkpoints, stop=lambda: run.counter.value == 10 * step)
    assert counts(checkpoints) == expected and run.done == []


def test_a_stop_within_a_step_saves_the_state_before_it(run: Run) -> None:
    def stop(loop: TrainLoop, step: int) -> None:
        if step == 4:
            raise Stopped

    checkpoints = Checkpoints()
    with pytest.raises(Saved, match="saved at step 3 of 5"):
        run(checkpoints, body=stop)
    assert counts(checkpoints) == [(2, 20), (3, 30)]
    with pytest.raises(Saved):
        run(Checkpoints(Resumed(3, {"count": 30}, ())), body=stop)


def test_a_stop_after_the_last_step_does_not_matter(run: Run) -> None:
    run(Checkpoints(), stop=lambda: run.counter.value == 50)
    assert run.done == [5]


def test_a_step_can_be_the_last(run: Run) -> None:
    checkpoints = Checkpoints()
    run(checkpoints, body=lambda loop, step: loop.end() if step == 3 else None)
    assert counts(checkpoints) == [(2, 20), (3, 30)] and run.done == [3]


def test_too_many_skipped_steps_end_the_stage_saved(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = Checkpoints()
    with pytest.raises(UserError, match="2 updates of the actor in a row"):
        run(checkpoints, skipped=True)
    assert counts(checkpoints) == [(2, 20)] and checkpoints.saves[0][1]["skipped_in_a_row"] == {"actor": 2}
    assert "warning: step 1: skipped 1 of 1 updates of the actor (1 in a row)" in capsys.readouterr().out
    with pytest.raises(UserError, match="3 updates of the actor in a row"):
        run(Checkpoints(Resumed(2, checkpoints.saves[0][1], ())), skipped=True)


@dataclass
class Partial:
    """Two optimizer steps of an unfinished step."""

    num_updates: int

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.num_updates}

    def tensors(self) -> dict[str, Any]:
        return {}


def test_a_stop_within_an_update_saves_how_far_it_is(run: Run) -> None:
    def stop(loop: TrainLoop, step: int) -> None:
        loop.partial = Partial(2)
        raise Stopped

    checkpoints = Checkpoints()
    with pytest.raises(Saved, match="within step 1 of 5, after 2 optimizer steps"):
        run(checkpoints, body=stop)
    [(iteration, state)] = checkpoints.saves
    assert iteration == 0 and state["count"] == 0 and state["unfinished"] == {"updates": 2}
