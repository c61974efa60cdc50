"""tools/gpu_check.sh around its parts: the table, exit codes, wheels, and what a failing or missing part comes to."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from tools.gpu_check import __main__ as runner
from tools.gpu_check import marked, wheels
from tools.gpu_check.child import EXTRA_SITE, ChildFailed, call
from tools.gpu_check.parts import PARTS, Part, look, reason_to_skip
from tools.gpu_check.rows import Row, at_least, at_most, skipped, table

ROOT = Path(__file__).parents[3]
NAN = float("nan")


def test_limits_take_no_nan() -> None:
    assert [at_most("x", value, 1.0).verdict for value in (1.0, 1.1, NAN)] == ["ok", "FAIL", "FAIL"]
    assert [at_least("x", value, 1.0).verdict for value in (1.0, 0.9, NAN)] == ["ok", "FAIL", "FAIL"]


def test_the_table_is_aligned_and_whole() -> None:
    lines = table([Row("short", "1", "≤ 2", part="p"), skipped("a longer name", "no reason")]).splitlines()
    assert [line.index("ok" if "ok" in line else "skipped") for line in lines[1:]] == [lines[0].index("verdict")] * 2
    assert lines[2].endswith("skipped: no reason")


@pytest.mark.parametrize(
    ("verdicts", "code"), [(["ok", "skipped: x"], 0), (["ok", "FAIL"], 1), (["skipped: x"], 2), ([], 2)]
)
def test_exit_codes(verdicts: list[str], code: int) -> None:
    assert runner.exit_code([Row("x", verdict=verdict) for verdict in verdicts]) == code


def test_without_a_gpu_every_part_is_skipped_and_the_exit_code_says_so(tmp_path: Path) -> None:
    """Called from another folder, with a path in it."""
    output = tmp_path / "rows.json"
    command = ["bash", str(ROOT / "tools" / "gpu_check.sh"), "--json", output.name]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2, done.stderr
    rows = json.loads(output.read_text())["rows"]
    assert [row["part"] for row in rows] == [part.name for part in PARTS]
    assert all(row["verdict"].startswith("skipped: ") for row in rows)
    assert f"{PARTS[-1].summary}" in done.stdout and "nothing was checked" in done.stderr


def test_an_unknown_part_is_refused(capsys) -> None:
    with pytest.raises(SystemExit) as error:
        runner.main(["cart"])
    assert error.value.code == 2 and "no part cart; there are card, parity" in capsys.readouterr().err


def test_parts_name_what_is_missing() -> None:
    found = look(["torch", "no_such_module", "no_such.module"])
    assert found["missing"] == ["no_such_module", "no_such.module"] and "PyTorch" in found["device"]
    part = Part("p", "", "", ("torch", "no_such_module"))
    assert reason_to_skip(part, found, "cpu") == "no_such_module not installed (see --wheels)"
    part = Part("p", "", "", ("torch",))
    assert reason_to_skip(part, found | {"cuda": False}, "cuda") == "no CUDA device"
    assert reason_to_skip(part, found | {"cuda": True}, "cuda") == reason_to_skip(part, found, "cpu") == ""
    assert look([]).keys() == found.keys()


def test_a_part_that_raises_or_dies_is_one_failed_row() -> None:
    part = Part("p", "summary", "os:no_such_function", ())
    (row,) = runner.run_part(part, {"missing": [], "cuda": False}, "cpu", "tiny")
    assert row.verdict == "FAIL" and "AttributeError" in row.result
    with pytest.raises(ChildFailed, match="exit code 3"):
        call("os:_exit", 60.0, status=3)


def test_a_call_that_hangs_is_ended_at_its_deadline() -> None:
    with pytest.raises(ChildFailed, match=r"did not end within 1 s"):
        call("builtins:__import__", 1.0, name="tests.unit.gpu_check.hang")


def test_own_layers_hide_transformer_engine_and_cpu_hides_gpus() -> None:
    seen = call("importlib.util:find_spec", 60.0, layers="own", name="transformer_engine")
    assert seen is None
    assert call("os:getenv", 60.0, device="cpu", key="CUDA_VISIBLE_DEVICES") == ""


def test_wheels_come_last_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_wheel(tmp_path, "gpu_check_example", "answer = 42\n")
    write_wheel(tmp_path, "numpy", "raise ImportError('the machine's own comes first')\n")
    site = tmp_path / "site"
    wheels.unpack(tmp_path, site)
    monkeypatch.setenv(EXTRA_SITE, str(site))
    assert call("tools.gpu_check.parts:_there", 60.0, module="gpu_check_example")
    assert call("tools.gpu_check.parts:look", 60.0, modules=["gpu_check_example"])["missing"] == []
    assert call("numpy:arange", 60.0, stop=2).tolist() == [0, 1]
    monkeypatch.delenv(EXTRA_SITE)
    assert not call("tools.gpu_check.parts:_there", 60.0, module="gpu_check_example")


def test_wheels_that_cannot_be_used_are_one_line(tmp_path: Path, capsys) -> None:
    assert runner.main(["--wheels", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"gpu_check: error: --wheels {tmp_path}: no .whl file there")
    (tmp_path / "broken-1.0-py3-none-any.whl").write_text("")
    assert runner.main(["--wheels", str(tmp_path)]) == 2
    assert "broken-1.0-py3-none-any.whl" in capsys.readouterr().err


def test_downloads_are_the_lock_s_pins() -> None:
    assert len(wheels.pins()) == len(wheels.PACKAGES)
    assert set(wheels.pins()) <= set(wheels.LOCK.read_text().replace(" ", "\n").splitlines())


def test_marked_tests_become_rows() -> None:
    report = marked.Report()
    base = {"nodeid": "tests/gpu/test_x.py::test_y", "when": "call", "duration": 1.0, "longrepr": None}
    for outcome in ("passed", "failed", "skipped"):
        said = ("file", 3, "Skipped: no reason") if outcome == "skipped" else "trace\nE  assert 1 == 2"
        flags = {"skipped": outcome == "skipped", "failed": outcome == "failed"}
        report.pytest_runtest_logreport(SimpleNamespace(**base | flags | {"longrepr": said}))
    assert [row.verdict for row in report.rows] == ["ok", "FAIL", "skipped: no reason"]
    assert report.rows[0].what == "test_x.py::test_y" and report.rows[1].result == "E  assert 1 == 2"


def write_wheel(folder: Path, name: str, content: str) -> None:
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", content)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
