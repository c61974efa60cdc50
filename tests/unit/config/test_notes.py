"""Values that cannot do what they are for are noted, not refused."""

from pathlib import Path

import pytest
import yaml

from megatron_vcppo.cli import main
from megatron_vcppo.config.load import load_config
from megatron_vcppo.config.rules.notes import EVERY_STAGE, METRIC_GROUPS
from megatron_vcppo.report.experiment_results import RESULTS_NAME, read_results

ROOT = Path(__file__).parents[3]
VALUES = {
    "run": {"dir": "runs/x"},
    "model": {"hf": "models/x"},
    "sft": {"train": "x", "steps": 50},
    "prompts": {"train": "x", "test": "x"},
    "stages": ["sft", "ppo", "export"],
    "ppo": {"critic": {"init": "sft"}, "iterations": 20, "evaluate_every": 5},
    "rollout": {"max_tokens": 100},
    "evaluate": {"num_samples": 4, "k": [1, 4]},
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(VALUES))
    return path


def notes_of(file: Path, *overrides: str) -> list[str]:
    found: list[str] = []
    load_config(file, overrides, note=found.append)
    return found


def best(stage: str, metric: str) -> str:
    return f"{stage}.checkpoint.keep_best.metric={metric}"


@pytest.mark.parametrize(
    ("override", "note"),
    [
        ("ppo.window_tokens=101", "ppo.window_tokens 101 is more than rollout.max_tokens 100: every response is whole"),
        ("export.checkpoint=iter_21", "export.checkpoint iter_21 is after the last one: ppo.iterations is 20"),
        (best("ppo", "evaluation/accuracy"), "evaluation/accuracy is not a metric that ppo writes"),
        (best("ppo", "evaluation/pass@8"), "evaluation/pass@8 is not a metric that ppo writes"),
        (best("ppo", "evaluation/math/maj@1"), "evaluation/math/maj@1 is not a metric that ppo writes"),
        (best("ppo", "sft/loss"), "ppo.checkpoint.keep_best.metric sft/loss is not a metric that ppo writes"),
        (best("ppo", "reward_mean"), "reward_mean is not a metric that ppo writes: no checkpoint will be kept"),
        (best("sft", "sft/validation_loss"), "sft/validation_loss is not a metric that sft writes"),
    ],
)
def test_what_cannot_be_right_is_noted(file: Path, override: str, note: str) -> None:
    (found,) = notes_of(file, override)
    assert found.startswith("note: ") and note in found


@pytest.mark.parametrize(
    "overrides",
    [
        ["ppo.window_tokens=100", "export.checkpoint=iter_0000020"],
        ["stages=[sft]", "ppo.window_tokens=101", "export.checkpoint=iter_21", best("ppo", "none")],
        ["stages=[sft,export]", "sft.steps=null", "export.checkpoint=iter_999"],
        [best("sft", "sft/validation_loss"), "sft.validation=x"],
        *([best("ppo", f"evaluation/{name}")] for name in ("avg", "pass@1", "maj@4_interval", "math/pass@4")),
        [best("ppo", "actor/some_term_of_the_loss")],
    ],
)
def test_what_may_be_right_is_not(file: Path, overrides: list[str]) -> None:
    assert notes_of(file, *overrides) == []


def test_commands_print_notes_and_refuse_nothing(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", str(file), "ppo.window_tokens=101"]) == 0
    output = capsys.readouterr()
    assert output.err.count("note: ppo.window_tokens 101") == 1 and "note" not in output.out


@pytest.mark.parametrize(
    "path", sorted((ROOT / "docs" / "results").glob(f"*/{RESULTS_NAME}")), ids=lambda p: p.parent.name
)
def test_the_table_has_the_metrics_of_real_runs(path: Path) -> None:
    for run in read_results(path).runs:
        for stage, records in run.data.history.items():
            groups = {name.partition("/")[0] for record in records for name in record if "/" in name}
            assert groups <= {*EVERY_STAGE, *METRIC_GROUPS[stage]}
