"""The report of an experiment: verdicts with their numbers, and the same page again from the kept file."""

import copy
import json
import math
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard

from megatron_vcppo.cli import main
from megatron_vcppo.commands.experiment_report import collect
from megatron_vcppo.errors import UserError
from megatron_vcppo.launch.experiment_file import FOLDER, read_experiment
from megatron_vcppo.report.chart_data import Lines
from megatron_vcppo.report.experiment_charts import experiment_charts, over_seeds
from megatron_vcppo.report.experiment_diagnosis import distinct, first_named, outcome_class, signature_rows
from megatron_vcppo.report.experiment_page import diagnosis_block, document_block, put_block, render_experiment
from megatron_vcppo.report.experiment_results import (
    RESULTS_NAME,
    ExperimentResults,
    joined,
    read_results,
    run_name,
    write_results,
)
from megatron_vcppo.report.experiment_tables import arm_rows, difference_rows, judged_claims
from megatron_vcppo.report.run_data import LARGEST
from megatron_vcppo.report.run_outcomes import OUTCOMES, outcome_of, outcome_rows
from megatron_vcppo.report.text_table import markdown_table
from tests.helpers.recorded_experiment import record_experiment
from tests.helpers.source import ROOT

KEPT = sorted((ROOT / "docs" / "results").glob(f"*/{RESULTS_NAME}"))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> tuple[Path, Path]:
    return record_experiment(tmp_path_factory.mktemp("experiment"))


@pytest.fixture(scope="module")
def results(recorded: tuple[Path, Path]) -> ExperimentResults:
    file, root = recorded
    return collect(read_experiment(file), root, range(3))


def test_claims_are_judged_by_the_differences_of_the_seeds(results: ExperimentResults) -> None:
    sound, collapse, contrary, margin, correlation = judged_claims(results)
    # Differences 0.70, 0.75, 0.74: mean 0.73, standard error 0.0153, times 4.303.
    assert sound.verdict == "supported"
    assert "83 ± 1.73 in sound against 10 ± 0.577 in collapsing; difference +73, 95 % interval +66.4 to +79.6" in (
        sound.numbers
    )
    assert collapse.verdict == "supported" and "against 50" in collapse.numbers
    assert contrary.verdict == "contrary" and margin.verdict == "contrary"
    assert correlation.verdict == "supported" and "6 runs" in correlation.numbers


def test_one_seed_is_judged_by_the_problems_or_not_at_all(results: ExperimentResults) -> None:
    first = ExperimentResults(results.question, results.made, [run for run in results.runs if run.seed == 0])
    sound, collapse, *_, correlation = judged_claims(first)
    # 0.80 - 0.10, half width √(0.03² + 0.03²) = 0.0424.
    assert sound.verdict == "supported" and "+65.8 to +74.2 (one seed; interval over problems)" in sound.numbers
    assert collapse.verdict == "not judged" and correlation.verdict == "not judged"


def test_tables_have_means_with_standard_errors(results: ExperimentResults) -> None:
    rows = {row["arm"]: row for row in arm_rows(results)}
    assert rows["sound"]["pass@1 after PPO, %"] == "83 ± 1.73" and rows["sound"]["seeds"] == "3"
    assert rows["sound"]["pass@1 after SFT, %"] == "45 ± 0"
    (row,) = difference_rows(results)
    assert row["arm"] == "sound − collapsing" and row["pass@1 after PPO, %"] == "+73 ± 1.53"


def test_what_follows_the_first_iteration_is_an_outcome_of_its_own(results: ExperimentResults) -> None:
    run = copy.deepcopy(results.runs[0].data)
    values = {1.0: 9.0, 2.0: 1.0, 3.0: 2.0, 4.0: 6.0, 5.0: 50.0}
    rows = [{"iteration": i, "critic/mc_explained_variance": value} for i, value in values.items()]
    run.history["ppo"] = rows
    assert outcome_of("mc_explained_variance_early", run) == 3.0
    run.history["ppo"] = rows[:1]
    assert outcome_of("mc_explained_variance_early", run) is None


def test_curves_are_means_with_a_band_of_one_standard_error() -> None:
    points, band = over_seeds([[(1, 2.0), (2, 5.0)], [(1, 4.0)], [(1, 6.0), (3, None)]])
    assert points == [(1, 4.0), (2, 5.0)]
    ((x, low, high),) = band
    assert x == 1 and (low, high) == pytest.approx((4 - 2 / math.sqrt(3), 4 + 2 / math.sqrt(3)))


def test_figures_that_have_something_to_show_are_drawn(results: ExperimentResults) -> None:
    charts = experiment_charts(results)
    assert len(charts) == 5, "no run has a reward model's score"
    assert len({chart.name for chart in charts}) == 5
    lengths, _, profile, scatter, setting = (chart.content for chart in charts if isinstance(chart.content, Lines))
    assert [line.name for line in lengths.lines] == ["collapsing", "sound"]
    assert len(lengths.lines[0].points) == len(lengths.lines[0].band) == 6
    assert len(profile.lines[0].points) == 10 and len(scatter.lines[1].points) == 3
    assert [line.points for line in setting.lines] == [[(0.95, pytest.approx(10))], [(1.0, pytest.approx(83))]]


def test_a_stage_that_a_run_does_not_have_had_no_steps(results: ExperimentResults) -> None:
    """Its configuration has the key's default all the same."""
    runs = copy.deepcopy(results.runs)
    for run in runs:
        run.data.config["value_pretrain"] = {"steps": 100, "batch_size": 8}
        run.data.stages[:] = ["sft", "ppo", "evaluate"] + ["value_pretrain"] * (run.arm == "sound")
    xs = {}
    for key in ("steps", "batch_size"):
        figures = ({"setting": f"value_pretrain.{key}", "outcome": "pass@1"},)
        question = replace(results.question, figures=figures)
        (chart,) = experiment_charts(ExperimentResults(question, {}, runs))
        assert isinstance(chart.content, Lines)
        xs[key] = {line.name: [x for x, _ in line.points] for line in chart.content.lines}
    assert xs == {"steps": {"collapsing": [0.0], "sound": [100.0]}, "batch_size": {"sound": [8.0]}}


def test_arms_that_are_equal_are_one_line(results: ExperimentResults) -> None:
    runs = [replace(run, arm=arm) for run in results.runs if run.arm == "sound" for arm in results.question.arms]
    question = replace(results.question, figures=({"curve": "rollout/length_mean"},))
    (chart,) = experiment_charts(ExperimentResults(question, {}, runs))
    assert isinstance(chart.content, Lines)
    assert [line.name for line in chart.content.lines] == ["collapsing = sound"]


def test_a_shared_stage_is_timed_once(results: ExperimentResults) -> None:
    runs = copy.deepcopy(results.runs)
    for run in runs:
        run.data.history.pop("sft", None)
    seconds = ExperimentResults(results.question, {}, runs).seconds()
    for run in runs:
        run.data.history["sft"] = [{"iteration": 1, "time/step_s": 40.0}, {"iteration": 2, "time/step_s": 60.0}]
    assert ExperimentResults(results.question, {}, runs).seconds() == pytest.approx(seconds + 100.0)


def test_the_document_has_the_table_of_outcomes() -> None:
    table = markdown_table(outcome_rows())
    assert table in (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8"), f"it is\n{table}"


def test_the_diagnosis_is_compared_with_what_became_of_the_runs(results: ExperimentResults) -> None:
    classes = {run.arm: outcome_class(run.data) for run in results.runs}
    assert classes == {"collapsing": "failed", "sound": "healthy"}
    frozen = copy.deepcopy(results.runs[-1].data)
    frozen.config["ppo"] |= {"iterations": 20, "critic_only_iterations": 20}
    assert outcome_class(frozen) == "between", "nothing can become of an actor that is not trained"
    for run in results.runs:
        unfinished = replace(run.data, done=run.data.done - {"ppo"})
        assert outcome_class(unfinished) == {"collapsing": "failed", "sound": "between"}[run.arm]
    named = first_named(results.runs[0].data)
    assert named["value_misalignment"] == 1 and named["length_collapse"] > 1
    rows = {row["sign"]: row for row in signature_rows(results.runs)}
    assert rows["value_misalignment"]["failed runs named early"] == "3 of 3"
    assert rows["any of them"]["healthy runs with an alarm"] == "0 of 3"
    fitted = next(
        row for sign, row in rows.items() if "below the worst reward by more than" in sign and "fitted" in sign
    )
    assert fitted["failed runs named early"] == "1 of 1" and fitted["healthy runs with an alarm"] == "0 of 1"


def test_a_half_done_experiment_compares_the_seeds_that_both_arms_have(results: ExperimentResults) -> None:
    """Difference, interval and the means that are shown are all of seed 2: 0.83 − 0.09."""
    runs = [run for run in results.runs if run.arm == "sound" or run.seed == 2]
    sound, *_ = judged_claims(replace(results, runs=runs))
    text = "83 in sound against 9 in collapsing; difference +74, 95 % interval +69.8 to +78.2 (one seed; interval over"
    assert text in sound.numbers


def test_seeds_that_are_left_out_are_named(recorded: tuple[Path, Path], capsys) -> None:
    file, root = recorded
    assert [run.seed for run in collect(read_experiment(file), root, range(1, 3)).runs] == [1, 2, 1, 2]
    assert "note: seed 0 is there, too, and left out: see --first-seed and --seeds" in capsys.readouterr().err


def test_kept_results_draw_the_same_page_and_name_no_place(
    recorded: tuple[Path, Path], results: ExperimentResults, tmp_path: Path
) -> None:
    kept = tmp_path / "kept.jsonl.zst"
    results.runs[0].data.config["model"]["hf"] = "/home/somebody/models/tiny"
    results.runs[0].data.config["value_pretrain"]["stored_path"] = f"{recorded[1]}/collapse/rollouts"
    write_results(kept, results, root=str(recorded[1]))
    again = read_results(kept)
    assert again.runs[0].data.config["model"]["hf"] == "tiny"
    assert again.runs[0].data.config["value_pretrain"]["stored_path"] == "collapse/rollouts"
    assert render_experiment(again) == render_experiment(read_results(kept))
    for run, other in zip(results.runs, again.runs, strict=True):
        assert run.data.results == other.data.results
        before, after = ({name: outcome_of(name, data) for name in OUTCOMES} for data in (run.data, other.data))
        assert [name for name in OUTCOMES if before[name] is None] == [name for name in OUTCOMES if after[name] is None]
        assert [x for x in after.values() if x] == pytest.approx([x for x in before.values() if x], rel=1e-4)
    assert judged_claims(again)[0] == judged_claims(results)[0]
    write_results(tmp_path / "twice.jsonl.zst", again)
    assert read_results(tmp_path / "twice.jsonl.zst") == again
    assert kept.stat().st_size < 40_000
    assert str(recorded[1]) not in repr(again)


@pytest.mark.parametrize("content", [b"", b"not compressed", None])
def test_a_damaged_file_is_named(content: bytes | None, results: ExperimentResults, tmp_path: Path) -> None:
    kept = tmp_path / "kept.jsonl.zst"
    write_results(kept, results)
    kept.write_bytes(kept.read_bytes()[:-20] if content is None else content)
    with pytest.raises(UserError, match=r"kept\.jsonl\.zst"):
        read_results(kept)


DAMAGES: dict[str, tuple[int, dict[str, object]]] = {
    "texts": (1, {"history": {"ppo": {"iteration": [1, 2], "rollout/length_mean": ["a", "b"]}}}),
    "ragged columns": (1, {"history": {"ppo": {"iteration": [1, 2], "rollout/length_mean": [3.0]}}}),
    "no iterations": (1, {"history": {"ppo": {"rollout/length_mean": [3.0, 4.0]}}}),
    "an iteration of null": (1, {"history": {"ppo": {"iteration": [1, None], "rollout/length_mean": [3.0, 4.0]}}}),
    "a huge integer": (1, {"history": {"ppo": {"iteration": [1, 10**400], "rollout/length_mean": [3.0, 4.0]}}}),
    "a huge number": (1, {"history": {"ppo": {"iteration": [1, 2], "rollout/length_mean": [-1e308, 1e308]}}}),
    "results of text": (1, {"results": "x"}),
    "results without scores": (1, {"results": [{"name": "ppo"}]}),
    "profiles of numbers": (1, {"profiles": [1]}),
    "a profile without positions": (1, {"profiles": [{"iteration": 1, "advantage_by_decile": 3}]}),
    "a configuration of text": (1, {"config": {"rollout": {"max_tokens": "x"}}}),
    "a weight of text": (1, {"config": {"rewards": {"model": {"path": "x", "clip": 1.0, "weight": "y"}}}}),
    "a huge length": (1, {"config": {"rollout": {"max_tokens": 10**400}}}),
    "an unknown arm": (1, {"arm": "neither"}),
    "made of a number": (0, {"made": 5}),
    "no question": (0, {"question": []}),
    "no arms": (0, {"question": {"arms": {}}}),
    "an outcome of a list": (0, {"question": {"arms": {"sound": {}}, "outcomes": [[]]}}),
    "a figure of an object": (0, {"question": {"arms": {"sound": {}}, "figures": [{"curve": {}}]}}),
    "a huge claim": (
        0,
        {
            "question": {
                "arms": {"sound": {}, "collapsing": {}},
                "claims": [{"text": "x", "outcome": "gain", "higher": "sound", "than": 10**400}],
            }
        },
    ),
}
"""Line of the file, from 0, and what is changed in it."""


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_of_every_kind_is_one_line(damage: str, results: ExperimentResults, tmp_path: Path, capsys) -> None:
    kept = tmp_path / "kept.jsonl.zst"
    write_results(kept, results)
    lines = [json.loads(line) for line in zstandard.decompress(kept.read_bytes()).splitlines()]
    number, changed = DAMAGES[damage]
    lines[number] |= changed
    kept.write_bytes(zstandard.compress("".join(f"{json.dumps(line)}\n" for line in lines).encode()))
    assert main(["experiment", "--redraw", str(kept), "--out", str(tmp_path / "page.html")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"vcppo: error: {kept}: "), line
    assert not (tmp_path / "page.html").exists()


def test_numbers_just_within_the_limit_are_drawn(results: ExperimentResults, tmp_path: Path) -> None:
    kept = tmp_path / "kept.jsonl.zst"
    extreme = copy.deepcopy(results)
    for row in extreme.runs[0].data.history["ppo"]:
        row |= {name: LARGEST for name in row if name != "iteration"}
    extreme.runs[1].data.history["ppo"][0]["rollout/length_mean"] = 1e200
    write_results(kept, extreme)
    assert main(["experiment", "--redraw", str(kept), "--out", str(tmp_path / "page.html")]) == 0


@pytest.mark.parametrize("line", [b"0", b"{}\n"])
def test_a_small_file_cannot_fill_the_memory(line: bytes, results: ExperimentResults, tmp_path: Path) -> None:
    """Behind a good head: one line of 600 MiB, or as much in many lines that are no run."""
    kept = tmp_path / "kept.jsonl.zst"
    write_results(kept, results)
    head = zstandard.decompress(kept.read_bytes()).splitlines(keepends=True)[0]
    packer = zstandard.ZstdCompressor(level=1).compressobj()
    block = line * ((1 << 20) // len(line))
    packed = [packer.compress(head), *(packer.compress(block) for _ in range(600)), packer.flush()]
    kept.write_bytes(b"".join(packed))
    tracemalloc.start()
    with pytest.raises(UserError, match=r"kept\.jsonl\.zst:?.*(a line of more than 64 MiB|damaged)"):
        read_results(kept)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300 << 20


def test_the_command_reports_and_redraws(recorded: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    file, root = recorded
    figures = tmp_path / "figures"
    assert main(["experiment", str(file), "--dir", str(root), "--report", "--figures", str(figures)]) == 0
    captured = capsys.readouterr()
    out = captured.out
    assert "config.yaml: stage evaluate needs" in captured.err, "a note: the runs are not what the file would make"
    assert "supported: The sound arm ends higher" in out and "contrary: The collapsing arm ends higher" in out
    assert len(list(figures.glob("*.pdf"))) == len(list(figures.glob("*.svg"))) == 5
    assert "note: nothing to draw for the figure {'curve': 'model_reward/score_mean'" in captured.err
    folder = root / "collapse"
    page, text = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    assert "<script" not in page and "http" not in page.replace("http://www.w3.org", "")
    assert "| sound | 3 |" in text and "## Diagnosis" in text
    assert main(["experiment", "--redraw", str(folder), "--out", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").read_text() == page
    assert not (tmp_path / "again.md").exists(), "that may be a document of the user's"
    assert main(["experiment", "--redraw", str(folder), "--out", str(figures)]) == 2
    assert f"{figures}: cannot write: Is a directory; choose another place with --out" in capsys.readouterr().err
    assert len(list(figures.iterdir())) == 10, "nothing of the folder is lost"
    capsys.readouterr()
    document = tmp_path / "results.md"
    document.write_text("<!-- results of diagnosis -->\n<!-- end of diagnosis -->\n", encoding="utf-8")
    assert main(["experiment", "--diagnosis", str(folder), str(folder), "--into", str(document)]) == 0
    assert "-->\n6 runs. Failed: the mean" in document.read_text(encoding="utf-8")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("value_misalignment")]
    assert line.split()[1:] == ["3", "of", "3", "3", "of", "3", "0", "of", "3"], (
        "a run that both files have counts once"
    )


def test_the_diagnosis_counts_runs_of_the_same_settings_once(results: ExperimentResults) -> None:
    other = copy.deepcopy(results.runs)
    for run in other:
        run.data.config["value_pretrain"]["stored_path"] = "another_experiment/reward_model/rollouts"
    assert len(distinct([*results.runs, *other])) == len(results.runs)
    other[0].data.config["ppo"]["minibatches"] = 7
    assert len(distinct([*results.runs, *other])) == len(results.runs) + 1


def test_results_go_into_a_document_between_the_marks(
    recorded: tuple[Path, Path], results: ExperimentResults, tmp_path: Path, capsys
) -> None:
    file, root = recorded
    document = tmp_path / "results.md"
    text = "# Results\n\n<!-- results of collapse -->\nNot run.\n<!-- end of collapse -->\n\nWhat it means.\n"
    document.write_text(text, encoding="utf-8")
    command = ["experiment", str(file), "--dir", str(root), "--report", "--into", str(document)]
    assert main(command) == 0
    once = document.read_text(encoding="utf-8")
    assert once.startswith("# Results\n\n<!-- results") and once.endswith("collapse -->\n\nWhat it means.\n")
    assert "Not run." not in once and "| The sound arm ends higher | supported |" in once
    assert "| sound | 3 |" in once and "| sound − collapsing |" in once and "| any of them | 3 of 3 |" in once
    again = ["experiment", "--redraw", str(root / "collapse"), "--out", str(tmp_path / "page.html")]
    assert main([*again, "--into", str(document)]) == 0
    assert document.read_text(encoding="utf-8") == once, "the kept numbers give the same tables"
    document.write_text(f"{once}\n![Length](figures/response_length.svg)\n", encoding="utf-8")
    assert main([*again, "--into", str(document), "--figures", str(tmp_path / "figures")]) == 0
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["response_length.svg"], "what it links to"
    document.write_text("# Results\n", encoding="utf-8")
    assert main(command) == 2
    assert "no place for the results of collapse: it is between the lines <!-- results of" in capsys.readouterr().err
    assert document.read_text(encoding="utf-8") == "# Results\n"


def test_seeds_of_another_machine_are_in_one_report(
    recorded: tuple[Path, Path], results: ExperimentResults, tmp_path: Path, capsys
) -> None:
    """Seed 0 was run here, as it were, and 1 and 2 elsewhere: the report is that of all three."""
    file, root = recorded
    elsewhere = tmp_path / RESULTS_NAME
    write_results(elsewhere, ExperimentResults(results.question, results.made, results.runs), root=str(root))
    command = ["experiment", str(file), "--dir", str(root), "--report", "--seeds", "1", "--with", str(tmp_path)]
    assert main(command) == 0
    both = read_results(root / "collapse")
    assert [(run.arm, run.seed) for run in both.runs] == [(run.arm, run.seed) for run in results.runs]
    assert both.made["runs of other machines"] == 4
    assert arm_rows(both) == arm_rows(read_results(elsewhere)) and judged_claims(both)[0].verdict == "supported"
    assert main([*command[:5], "--seeds", "1", "--first-seed", "2"]) == 0
    assert {run.seed for run in read_results(root / "collapse").runs} == {2}

    others = copy.deepcopy(results)
    others.runs[-1].data.config["ppo"]["minibatches"] = 7
    write_results(elsewhere, others, root=str(root))
    capsys.readouterr()
    assert main(command) == 2
    name = run_name(others.runs[-1].arm, 2)
    assert f"{tmp_path}: {name}: ppo.minibatches is 7 there, 1 here" in capsys.readouterr().err
    del others.question.arms["collapsing"]
    with pytest.raises(UserError, match="of one with other arms"):
        joined(results, others, elsewhere)


def test_nothing_to_report_is_one_line(recorded: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    assert main(["experiment", str(recorded[0]), "--dir", str(tmp_path), "--report"]) == 2
    assert "no run of this experiment has begun" in capsys.readouterr().err


@pytest.mark.parametrize("kept", KEPT, ids=lambda path: path.parent.name)
def test_the_document_of_results_has_what_the_kept_numbers_give(kept: Path) -> None:
    document, results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8"), read_results(kept)
    assert put_block(document, results.question.name, document_block(results)) == document, (
        "see vcppo experiment --into"
    )


@pytest.mark.skipif(not KEPT, reason="no results are kept")
def test_the_documents_diagnosis_is_that_of_all_kept_runs() -> None:
    document = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    runs = [run for kept in KEPT for run in read_results(kept).runs]
    assert put_block(document, "diagnosis", diagnosis_block(runs)) == document


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.yaml")))
def test_the_document_of_results_has_a_place_for_every_experiment(name: str) -> None:
    document = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert "filled" in put_block(document, name, "filled\n")
