"""tools/bench.py keeps the cases of a benchmark, and compares later ones with them."""

import json
from pathlib import Path

import pytest

from tools import bench
from tools.benchmarks._baselines import ratios, read_baselines


def run(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict]:
    bench.main([*words])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_ratios_are_of_the_numbers_that_both_have() -> None:
    now = {"name": "a", "fast": True, "s": 2.0, "new": 1.0, "zero": 0.0, "sizes": {"mb": 30}}
    assert ratios(now, {"name": "a", "fast": False, "s": 4.0, "zero": 1.0, "sizes": {"mb": 10}, "old": 3}) == {
        "s": 0.5,
        "sizes.mb": 3.0,
    }


def test_a_kept_run_is_what_a_later_one_is_compared_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, what = tmp_path / "baselines.json", ("verifiers", "--repeats", "1")
    with pytest.raises(SystemExit, match=r"no cases of: verifiers --repeats 1; --keep stores them"):
        run(capsys, *what, f"--compare={file}")
    kept = run(capsys, *what, f"--keep={file}")
    assert read_baselines(file)["verifiers --repeats 1"]["cases"] == kept
    content = json.loads(file.read_text())
    for case in content["verifiers --repeats 1"]["cases"]:
        for name, value in case.items():
            case[name] = 2 * value if isinstance(value, float) else value
    file.write_text(json.dumps(content))
    printed = run(capsys, *what, f"--compare={file}")
    assert len(printed) == 2 * len(kept) and all("over_baseline" in line for line in printed[1::2])
