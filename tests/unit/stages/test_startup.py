"""The phases of a start: they add up to the process's age, and are written once."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_vcppo.run.startup import Startup, read_startups


def test_a_process_knows_its_age() -> None:
    code = "import time; time.sleep(0.4); from megatron_vcppo.run.startup import process_age_s; print(process_age_s())"
    started = time.monotonic()
    age = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 0.4 <= age <= time.monotonic() - started + 0.02, "the kernel counts in hundredths"


def test_phases_add_up_and_are_written_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    startup = Startup()
    startup.done("imports")
    time.sleep(0.1)
    startup.done("model")
    startup.done("engines")
    time.sleep(0.1)
    startup.done("model")
    startup.finish(tmp_path)
    startup.done("push")
    startup.finish(tmp_path)
    (tmp_path / "startup.jsonl").open("a").write('{"torn')
    [record] = read_startups(tmp_path)
    assert record["model_s"] == pytest.approx(0.2, abs=0.09) and "push_s" not in record
    phases = [value for name, value in record.items() if name not in ("timestamp", "total_s")]
    assert len(phases) == 4 and sum(phases) == pytest.approx(record["total_s"], abs=0.03)
    assert "first iteration done" in capsys.readouterr().out
    assert read_startups(tmp_path / "none") == []
