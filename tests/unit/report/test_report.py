"""The report of recorded runs: what it shows, what it needs, and what it refuses."""

import json
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from megatron_vcppo.cli import main
from megatron_vcppo.commands.report import read_runs
from megatron_vcppo.records import RolloutPart
from megatron_vcppo.report.page import render
from megatron_vcppo.report.run_data import differences
from megatron_vcppo.report.samples import HEAD, TAIL, choose, shorten
from megatron_vcppo.run.manifest import write_manifest
from megatron_vcppo.run.metrics_log import MetricsLog
from megatron_vcppo.run.rollout_store import read_rollouts, write_rollouts
from tests.helpers.recorded_run import diagnostics_of, make_config, make_rollouts, record_run

RESULTS = [
    {
        "name": name,
        "avg": share,
        "avg_interval": 0.031,
        "pass": {"1": [share, 0.031]},
        "length_mean": 92.4,
        "truncated_share": 0.01,
    }
    for name, share in (("sft", 0.412), ("ppo", 0.843))
]


# The first row is as runs had it before intervals had ends and majorities were counted.
RESULTS[1] |= {
    "avg_range": [0.81, 0.872],
    "pass": {"1": [0.843, 0.031, 0.81, 0.872]},
    "maj": {"2": [0.9, 0.1, 0.8, 1.0]},
}
RESULTS[1]["tasks"] = {"running_sum": RESULTS[1] | {"avg": 0.917}, "search": RESULTS[1] | {"avg": 0.769}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A collapsing run and a sound one with an evaluation."""
    folder = tmp_path_factory.mktemp("runs")
    plain, sound = folder / "plain", folder / "vcppo"
    record_run(plain, collapsing=True)
    record_run(sound, collapsing=False)
    (sound / "evaluate").mkdir()
    (sound / "evaluate" / "results.json").write_text(json.dumps(RESULTS))
    write_manifest(sound / "evaluate", {}, only=["results.json"])
    return plain, sound


class Page(HTMLParser):
    """What a page holds. Fails on tags that do not nest, on repeated ids, and on anything loaded from elsewhere."""

    VOID = ("meta", "br")

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.count: Counter[str] = Counter()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.labels: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(source)
        self.close()
        assert source.startswith("<!doctype html>") and not self.open, self.open
        assert len(set(self.ids)) == len(self.ids), [name for name, count in Counter(self.ids).items() if count > 1]
        assert all(link.startswith("#") and link[1:] in self.ids for link in self.links)
        assert "url(" not in source.replace("url(#", "") and "@import" not in source

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe", "object")
        self.count[tag] += 1
        for name, value in attrs:
            assert name != "src" and not name.startswith("on")
            if name.endswith("href"):
                self.links.append(value or "")
            if name == "id":
                self.ids.append(value or "")
            if name == "aria-label":
                self.labels.append(value or "")
            if name in ("d", "x", "y", "width", "height"):
                assert "nan" not in (value or "") and "inf" not in (value or "")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data.strip()


def page_of(*folders: Path) -> Page:
    return Page(render(read_runs(folders), "2026-01-31 12:00"))


def test_the_page_of_a_collapsed_run_says_so(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(runs[0])]) == 0
    out = capsys.readouterr().out
    assert "length_collapse: mean length" in out
    path = runs[0] / "report.html"
    page = Page(path.read_text())
    for text in ("length collapse", "Explained variance", "Advantage by decile", "iteration 12", "wrong: 3 for 7"):
        assert text in page.text
    assert "3 <b>#1</b> +4 ?" in page.text and "lam_critic: 0.95" in page.text
    assert page.count["svg"] == len(page.labels) and any(label.startswith("Response length") for label in page.labels)
    assert path.stat().st_size < 400_000
    assert not list(runs[0].glob(".*"))


def test_verifiers_are_drawn_only_if_one_failed(runs: tuple[Path, Path], tmp_path: Path) -> None:
    assert "Verifiers too slow" not in page_of(runs[0]).text
    config = make_config(tmp_path / "run", 1.0)
    record_run(tmp_path / "run", collapsing=False, iterations=2)
    with MetricsLog(tmp_path / "run" / "ppo", config, "ppo", resume_iteration=2) as log:
        log.log(3, {"rollout/verifier_timeouts": 4.0, "rollout/length_mean": 90.0})
    page = page_of(tmp_path / "run")
    assert "Verifiers too slow" in page.text and "Verifiers that failed" not in page.text


def test_several_runs_share_one_page(runs: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "both.html"
    assert main(["report", *map(str, runs), "--out", str(out)]) == 0
    page = Page(out.read_text())
    assert page.text.count("length collapse") == 2  # judged in both
    found = {row[1]: row[2:] for row in page.rows if len(row) == 7}
    assert found["actor of"] == ["avg", "pass@1", "maj@2", "mean length", "truncated"]
    assert found["sft"] == ["41.2 ± 3.1 %", "41.2 ± 3.1 %", "", "92.4", "1.0 %"]
    share, majority = "84.3 % (81.0 to 87.2)", "90.0 % (80.0 to 100.0)"
    assert found["ppo"] == [share, share, majority, "92.4", "1.0 %"]
    assert found["running_sum"][0].startswith("91.7 %") and found["search"][0].startswith("76.9 %")
    assert ["ppo.advantage.lam_critic", "0.95", "1.0"] in page.rows
    assert "Advantage by position: vcppo" in page.text
    changed = differences(read_runs(runs))
    assert changed["ppo.advantage.lam_critic"] == [0.95, 1.0]
    assert set(changed) == {"ppo.advantage.lam_critic", "run.dir"}


def test_what_a_model_or_a_user_wrote_is_text(tmp_path: Path) -> None:
    attack = "</pre><script>alert(1)</script><svg onload=alert(1)>{{ 7 * 7 }}"
    config = make_config(tmp_path / "<b>run" / "&", 1.0)
    run = Path(config.run.dir)
    record_run(run, collapsing=False, iterations=2, num_rollouts=6)
    (run / "config.yaml").write_text(f"stages: [ppo]\nname: '{attack}'\n")
    rollouts = read_rollouts(run / "ppo" / "rollouts", 2)
    write_rollouts(
        run / "ppo" / "rollouts", 2, RolloutPart.whole([replace(one, response_text=attack) for one in rollouts])
    )
    other = tmp_path / "<script>"
    record_run(other, collapsing=False, iterations=2, num_rollouts=6)
    page = page_of(run, other)
    assert page.text.count(attack) > 2 and "<script>" in page.text and "& against <script>" in page.text


def test_the_stages_of_a_run_are_told_apart(runs: tuple[Path, Path]) -> None:
    page = page_of(runs[1])
    assert page.text.count("not started") == 1  # value_pretrain
    assert page.text.count("not finished") == 2  # sft and ppo have no manifest here
    assert "60 of 60 iterations" in page.text


@pytest.mark.parametrize("stages", [[], ["sft"], ["sft", "ppo"]])
def test_what_is_not_there_yet_is_no_error(tmp_path: Path, stages: list[str]) -> None:
    config = make_config(tmp_path / "run", 1.0)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("stages: [sft, ppo]\ncluster: {environment: {KEY: secret-word}}\n")
    for stage in stages:
        with MetricsLog(tmp_path / "run" / stage, config, stage) as log:
            log.log(1, {"sft/loss": 1.5} if stage == "sft" else {"rollout/reward_mean": float("nan")})
    page = page_of(tmp_path / "run")
    assert page.text.count("not started") == 2 - len(stages)
    assert "secret-word" not in page.text and "KEY" in page.text


def test_what_is_not_finite_is_counted_but_not_drawn(tmp_path: Path) -> None:
    config = record_run(tmp_path / "run", collapsing=False, iterations=3, num_rollouts=6)
    with MetricsLog(tmp_path / "run" / "ppo", config, "ppo", resume_iteration=3) as log:
        log.log(4, {"critic/value_loss": float("nan"), "rollout/length_mean": float("inf")})
    assert "1 values that are not finite are not drawn" in page_of(tmp_path / "run").text


def test_nothing_is_said_about_a_critic_that_is_not_there(tmp_path: Path) -> None:
    config = make_config(tmp_path / "run", 1.0)
    config.ppo.advantage.baseline = "rloo"
    generator = np.random.default_rng(0)
    metrics, profiles = diagnostics_of(config, make_rollouts(generator, 1, 60, 16), generator, None)
    assert not [name for name in metrics if name.startswith("critic/")]
    assert set(profiles) == {"advantage_by_position", "advantage_by_decile"}


def test_long_runs_stay_small(tmp_path: Path) -> None:
    config = make_config(tmp_path / "run", 1.0)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("stages: [ppo]\n")
    names = ("rollout/reward_mean", "rollout/accuracy", "critic/value_loss", "time/generation_s", "time/iteration_s")
    with MetricsLog(tmp_path / "run" / "ppo", config, "ppo") as log:
        for iteration in range(1, 5001):
            log.log(iteration, dict.fromkeys(names, iteration / 5000))
    source = render(read_runs([tmp_path / "run"]), "")
    assert len(source) < 100_000
    assert "each point is the mean of 17 iterations" in source


def test_profiles_of_a_resumed_run_are_those_of_the_last_attempt(tmp_path: Path) -> None:
    record_run(tmp_path / "run", collapsing=False, iterations=2, num_rollouts=6)
    with (tmp_path / "run" / "ppo" / "profiles.jsonl").open("a") as file:
        file.write(json.dumps({"iteration": 2, "advantage_by_decile": [0.5] * 10}) + "\n" + '{"iteration": 3, "adv')
    profiles = read_runs([tmp_path / "run"])[0].profiles
    assert [record["iteration"] for record in profiles] == [1, 2]
    assert profiles[1]["advantage_by_decile"] == [0.5] * 10


def test_rollouts_still_being_written_are_passed_over(tmp_path: Path) -> None:
    record_run(tmp_path / "run", collapsing=False, iterations=3, num_rollouts=6)
    rollouts = tmp_path / "run" / "ppo" / "rollouts"
    (rollouts / "iter_0000003_0of1.npz").rename(rollouts / "iter_0000003_0of2.npz")
    samples = read_runs([tmp_path / "run"])[0].samples
    assert [(one.stage, one.iteration, one.num_rollouts) for one in samples] == [("ppo", 1, 6), ("ppo", 2, 6)]
    (rollouts / "iter_0000001_0of1.npz").unlink()
    assert [one.iteration for one in read_runs([tmp_path / "run"])[0].samples] == [2]


def test_chosen_rollouts_are_what_they_are_called(runs: tuple[Path, Path]) -> None:
    rollouts = read_rollouts(runs[1] / "ppo" / "rollouts", 12)
    samples = choose("ppo", 12, iter(rollouts))
    chosen = samples.chosen
    assert samples.num_rollouts == 48 and samples.num_correct == sum(r.reward == 1 for r in rollouts)
    assert samples.num_truncated == sum(r.truncated for r in rollouts) > 0
    by_reason = {reason: [r for reasons, r in chosen if reason in reasons] for reason in ("best", "worst", "longest")}
    assert [r.reward for r in by_reason["best"]] == [1.0, 1.0]
    assert [r.reward for r in by_reason["worst"]] == [-1.0, -1.0]
    longest = sorted((len(r.response_ids) for r in rollouts), reverse=True)[:2]
    assert sorted((len(r.response_ids) for r in by_reason["longest"]), reverse=True) == longest
    assert [r.truncated for reasons, r in chosen if "truncated" in reasons] == [True] * min(2, samples.num_truncated)
    assert len({id(r) for _, r in chosen}) == len(chosen)


def test_long_texts_keep_both_ends() -> None:
    text = "a" * HEAD + "b" * 1234 + "c" * TAIL
    assert "1,234 characters are not shown" in shorten(text) and "b" not in shorten(text)[:HEAD]
    assert shorten(text[: HEAD + TAIL]) == text[: HEAD + TAIL]


def broken(folder: Path, name: str) -> list[str]:
    """The arguments of a call that cannot work."""
    run = folder / "run"
    run.mkdir()
    (run / "config.yaml").write_text({"yaml": "a: [", "list": "- 1\n"}.get(name, "stages: [sft]\n"))
    if name == "results":
        (run / "evaluate").mkdir()
        (run / "evaluate" / "results.json").write_text("{")
    return {
        "none": [str(folder)],
        "missing": [str(folder / "x")],
        "twice": [str(run), f"{run}/"],
        "out": [str(run), "--out", str(folder / "no" / "such.html")],
        "figures": [str(run), "--figures", str(run / "config.yaml")],
    }.get(name, [str(run)])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none", "not a run folder: it has no config.yaml"),
        ("missing", "not a run folder: it has no config.yaml"),
        ("twice", "the same run is named twice"),
        ("yaml", "cannot be read as YAML"),
        ("list", "not a configuration"),
        ("results", "results.json: cannot be read as JSON"),
        ("out", "choose another place with --out"),
        ("figures", "choose another place with --figures"),
    ],
)
def test_mistakes_cost_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, message: str) -> None:
    assert main(["report", *broken(tmp_path, name)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.rglob("*.html*"))
