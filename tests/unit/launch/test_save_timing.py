"""When a stage is asked to save, and how long that may take."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_vcppo.launch import save_timing
from megatron_vcppo.launch.save_timing import (
    LEAST_S,
    STOP_S,
    save_allowance_s,
    save_clock,
    save_margin_s,
    signal_margin_s,
)
from megatron_vcppo.run import events
from megatron_vcppo.run.folder import RunFolder
from tools.benchmarks._tiny_chains import tiny_config, write_config


def log_records(run: RunFolder, records: list[dict[str, float]]) -> None:
    run.stage("ppo").make()
    text = "".join(json.dumps({"iteration": n} | record) + "\n" for n, record in enumerate(records, 1))
    run.stage("ppo").metrics.write_text(text)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> float:
    """The time that save_timing reads, standing still."""
    monkeypatch.setattr(save_timing, "time", SimpleNamespace(time=lambda: 1000.0))
    return 1000.0


def test_a_save_gets_what_pieces_of_work_and_saves_were_measured_to_need(tmp_path: Path, now: float) -> None:
    """Not what whole iterations need: a stop comes between pieces."""
    run = write_config(tiny_config(tmp_path))
    end, never = now + 100_000, float("inf")
    assert save_margin_s(run, "ppo", 300) == 300, "nothing was measured"
    assert save_allowance_s(run, "ppo", 600, never) == 600
    assert save_allowance_s(run, "ppo", 600, end) == 100_000 - STOP_S
    iteration = {"timestamp": 0.0, "time/iteration_s": 4000.0, "stopping/longest_piece_s": 40.0}
    log_records(run, [iteration])
    assert save_margin_s(run, "ppo", 300) == 300, "no save has been timed"
    log_records(run, [iteration, iteration | {"timestamp": 4000.0, "stopping/save_s": 500.0}])
    assert save_margin_s(run, "ppo", 300) == 2 * 540 + STOP_S
    assert save_allowance_s(run, "ppo", 600, never) == save_allowance_s(run, "ppo", 600, end) == 2 * 540
    assert save_allowance_s(run, "ppo", 600, now + 700) == 700 - STOP_S
    assert save_allowance_s(run, "ppo", 600, now - 5) == STOP_S, "the job's end came before the request"
    log_records(run, [{"stopping/longest_piece_s": 0.01, "stopping/save_s": 0.1}])
    assert save_allowance_s(run, "ppo", 600, end) == LEAST_S and save_margin_s(run, "ppo", 300) == STOP_S
    assert signal_margin_s(run, "ppo", 300, 3600) == STOP_S + 60
    assert signal_margin_s(run, "ppo", 300, 60) == 30, "at most half of the time limit"


def test_a_save_is_due_within_the_margin_but_never_in_the_first_half(tmp_path: Path, monkeypatch) -> None:
    run, clock = write_config(tiny_config(tmp_path)), SimpleNamespace(now=1000.0)
    monkeypatch.setattr(save_timing, "time", SimpleNamespace(time=lambda: clock.now))
    short, long = save_clock(run, "ppo", 1200.0, default_s=300), save_clock(run, "ppo", 9000.0, default_s=300)
    for clock.now, due in ((1099.0, (False, False)), (1101.0, (True, False)), (8701.0, (True, True))):
        assert (short(), long()) == due


def test_stops_of_earlier_attempts_count_where_nothing_else_was_measured_or_they_were_too_slow(tmp_path: Path) -> None:
    run = write_config(tiny_config(tmp_path))
    events.append(run.path, "attempt_end", stage="ppo", code=1, leaving_s=None)
    events.append(run.path, "attempt_end", stage="ppo", code=75, leaving_s=70.0)
    assert save_margin_s(run, "ppo", 300) == 2 * 70 + STOP_S
    log_records(run, [{"stopping/longest_piece_s": 5.0, "stopping/save_s": 15.0}])
    assert save_margin_s(run, "ppo", 300) == 2 * 20 + STOP_S
    events.append(run.path, "attempt_end", stage="ppo", code=1, leaving_s=60.0)
    assert save_margin_s(run, "ppo", 300) == 2 * 60 + STOP_S, "it was ended after 60 s: it needs more"
