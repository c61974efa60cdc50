"""The phases of a start: they add up to the process's age, and are written once."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_vcppo.run import startup as module
from megatron_vcppo.run.startup import Startup, read_startups


def test_a_process_knows_its_age() -> None:
    code = "import time; time.sleep(0.4); from megatron_vcppo.run.startup import process_age_s; print(process_age_s())"
    started = time.monotonic()
    age = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    tick_s = 1 / os.sysconf("SC_CLK_TCK")
    assert 0.4 <= age <= time.monotonic() - started + 2 * tick_s


def test_phases_add_up_and_are_written_once(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    ages = iter([1.0, 1.5, 3.5, 4.0, 10.0])
    monkeypatch.setattr(module, "process_age_s", lambda: next(ages))
    startup = Startup()
    for phase in ("imports", "model", "engines", "model"):
        startup.done(phase)
    startup.finish(tmp_path)
    startup.done("push")
    startup.finish(tmp_path)
    [record] = read_startups(tmp_path)
    del record["timestamp"]
    assert record == {"total_s": 10.0, "imports_s": 1.0, "model_s": 1.0, "engines_s": 2.0, "iteration_s": 6.0}
    assert "first iteration done 10.0 s after the start" in capsys.readouterr().out
    assert read_startups(tmp_path / "none") == []
