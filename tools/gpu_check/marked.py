"""The tests under tests/gpu that are marked gpu, one row each; not the one that runs this check."""

from pathlib import Path
from typing import Any

from tools.gpu_check.rows import Row, skipped

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tests" / "gpu"
SELF = "test_gpu_check.py"


def run(target: str, size: str) -> list[Row]:
    """What pytest reports."""
    import pytest

    report = Report()
    files = [str(path) for path in sorted(FOLDER.glob("test_*.py")) if path.name != SELF]
    if not files:
        return [skipped("tests marked gpu", "there are none")]
    options = ["-m", "gpu", "-q", "--durations=0", "-p", "no:cacheprovider", f"--rootdir={ROOT}"]
    code = pytest.main([*options, *files], plugins=[report])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        report.rows.append(Row("tests/gpu", f"pytest ended with {code!r}", "runs", "FAIL"))
    return report.rows


class Report:
    """A pytest plugin that keeps one row per test."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        """A test's call, or a set-up that failed or skipped it."""
        name = report.nodeid.rpartition("/")[2]
        if report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.rows.append(skipped(name, reason.removeprefix("Skipped: ")))
        elif report.failed:
            lines = str(report.longrepr).strip().splitlines()
            self.rows.append(Row(name, lines[-1] if lines else report.when, "passes", "FAIL"))
        elif report.when == "call":
            self.rows.append(Row(name, f"{report.duration:.1f} s", "passes"))
