"""Progress lines: how often, and with which rate and ETA. The clock is the test's."""

import io

import pytest

from megatron_vcppo.run.progress import Progress


class Clock:
    """Seconds that pass only when a test says so."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_a_log_gets_few_lines_with_rate_and_eta() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress("sft", 40, start=20, unit="tok", every_s=10.0, stream=stream, clock=clock)
    for position in range(21, 41):
        clock.now_s += 3.0
        progress.update(position, 4573, {"loss": 1.2345, "lr": 1e-6})
    assert stream.getvalue().splitlines() == [
        "sft 24/40 60% | 1.52k tok/s | ETA 00:48 | loss 1.23 lr 1.0e-06",
        "sft 28/40 70% | 1.52k tok/s | ETA 00:36 | loss 1.23 lr 1.0e-06",
        "sft 32/40 80% | 1.52k tok/s | ETA 00:24 | loss 1.23 lr 1.0e-06",
        "sft 36/40 90% | 1.52k tok/s | ETA 00:12 | loss 1.23 lr 1.0e-06",
        "sft 40/40 100% | 1.52k tok/s | ETA 00:00 | loss 1.23 lr 1.0e-06",
    ]


def test_the_rate_is_that_of_the_last_updates() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress("ppo", 100, unit="tok", every_s=0, stream=stream, clock=clock)
    for position in range(1, 41):
        clock.now_s += 1000.0 if position <= 20 else 60.0
        progress.update(position, 60)
    assert stream.getvalue().splitlines()[-1] == "ppo 40/100 40% | 1 tok/s | ETA 1:00:00"


@pytest.mark.parametrize(
    ("count", "rate"), [(0, "0"), (1, "1"), (999, "999"), (999_600, "1M"), (2_500_000_000, "2.5G")]
)
def test_rates_have_three_digits(count: int, rate: str) -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress("export", 10, unit="B", every_s=0, stream=stream, clock=clock)
    clock.now_s += 1.0
    progress.update(5, count)
    assert f"| {rate} B/s |" in stream.getvalue()


def test_nothing_to_do_is_no_error() -> None:
    stream = io.StringIO()
    Progress("empty", 0, stream=stream, clock=Clock()).update(0, 0)
    assert "empty 0/0 100%" in stream.getvalue()


def test_waiting_prints_where_it_stands_once_a_line_is_due() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress("rollouts", 8, unit="tok", every_s=10.0, stream=stream, clock=clock)
    for _ in range(25):
        clock.now_s += 1.0
        progress.wait({"running": 8})
    clock.now_s += 1.0
    progress.update(4, 520, {"running": 4})
    clock.now_s += 10.0
    progress.wait({"running": 4})
    assert stream.getvalue().splitlines() == [
        "rollouts 0/8 0% | 0 tok/s | running 8",
        "rollouts 0/8 0% | 0 tok/s | running 8",
        "rollouts 4/8 50% | 20 tok/s | ETA 00:26 | running 4",
    ], "waiting counts for the rate once something has come"
