"""The phases of a start: they add up to the process's age, and are written once."""

from pathlib import Path

import pytest

from megatron_vcppo.run.events import Startup, forked_at_s, process_age_s, read_startups


def test_a_process_knows_its_age() -> None:
    fields = " ".join(str(number) for number in range(3, 53))  # starttime is field 22 of the line
    assert forked_at_s(f"17 (a name) with )) {fields}", ticks_per_s=100) == 0.22
    first = process_age_s()
    assert 0 < first <= process_age_s()


def test_phases_add_up_and_are_written_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ages_s = iter((3.0, 3.5, 13.5, 14.75, 15.0))
    startup = Startup(lambda: next(ages_s))
    for phase in ("imports", "model", "engines", "model"):
        startup.done(phase)
    startup.finish(tmp_path)
    startup.done("push")
    startup.finish(tmp_path)
    [record] = read_startups(tmp_path)
    del record["timestamp"]
    expected = {"imports_s": 3.0, "model_s": 1.75, "engines_s": 10.0, "iteration_s": 0.25, "total_s": 15.0}
    assert record == expected
    assert "first iteration done 15.0 s after the start" in capsys.readouterr().out
    assert read_startups(tmp_path / "none") == []
