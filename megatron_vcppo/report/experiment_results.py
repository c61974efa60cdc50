"""The numbers of an experiment's runs: read from their folders, kept as one small file, and read again from it.

The file is JSON lines, compressed with Zstandard: the question and where the numbers are from, then one line per run
with its metrics by column. It holds what the page draws and what the diagnosis reads, to five digits; no response, no
path of the machine, no value of cluster.environment.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import zstandard

from megatron_vcppo.errors import UserError
from megatron_vcppo.report.experiment_question import Question
from megatron_vcppo.report.run_data import (
    COLORS,
    LARGEST,
    Number,
    Profile,
    Result,
    RunData,
    check_settings,
    is_profile,
)
from megatron_vcppo.report.run_outcomes import outcome_of
from megatron_vcppo.run.compressed import open_file, read_lines
from megatron_vcppo.run.files import parse_json, write_bytes

FORMAT = 1
RESULTS_NAME = "experiment.jsonl.zst"
SECTIONS = (
    "stages",
    "model",
    "rollout",
    "sft",
    "reward_model",
    "value_pretrain",
    "ppo",
    "returns",
    "values",
    "rewards",
)
"""Of a run's configuration: what its numbers depend on."""
PLACES = {"hf", "stored_path", "engine"}
"""Keys below them that may differ between machines."""
NOT_KEPT = ("timestamp", "total_iterations", "speed/", "packing/", "stopping/", "time/")
TIMES = ("time/iteration_s", "time/step_s")
"""All that is kept of the times."""
DIGITS = 5
LARGEST_BYTES = 1 << 26
"""Of a file of results, unpacked; those in docs/results have up to 5 MB."""


class Head(msgspec.Struct):
    """The first line of the file."""

    question: dict[str, Any]
    made: dict[str, str | int | float]


class KeptRun(msgspec.Struct):
    """One of the others."""

    arm: str
    seed: int
    config: dict[str, Any]
    done: list[str]
    history: dict[str, dict[str, list[Number | None]]]
    profiles: list[Profile]
    results: list[Result]


@dataclass(frozen=True)
class ExperimentRun:
    """One arm with one seed."""

    arm: str
    seed: int
    data: RunData


@dataclass(frozen=True)
class ExperimentResults:
    """What there is of an experiment."""

    question: Question
    made: dict[str, Any]
    """When, where and with what: date, version, machine."""
    runs: list[ExperimentRun]

    def values(self, arm: str, outcome: str) -> dict[int, float]:
        """Seed → outcome, of the runs that have it."""
        found = {run.seed: outcome_of(outcome, run.data) for run in self.runs if run.arm == arm}
        return {seed: value for seed, value in found.items() if value is not None}

    def seconds(self) -> float:
        """What the logged iterations and steps of all runs took together; a shared stage, which several have, once."""
        times = {
            (stage, tuple(row.get(name, 0.0) for row in rows for name in TIMES))
            for run in self.runs
            for stage, rows in run.data.history.items()
        }
        return sum(sum(seconds) for _, seconds in times)


def arm_color(question: Question, arm: str) -> str:
    """The color of an arm in every chart."""
    return COLORS[list(question.arms).index(arm) % len(COLORS)]


def run_name(arm: str, seed: int) -> str:
    """Example: VC-PPO, seed 0."""
    return f"{arm}, seed {seed}"


def write_results(path: Path, results: ExperimentResults, root: str = "") -> None:
    """Keep the results. root: the folder of the experiments, to which paths are made relative."""
    head = {"format": FORMAT, "question": results.question.as_dict(), "made": results.made}
    lines = [json.dumps(line) for line in (head, *(_kept(run, root) for run in results.runs))]
    content = "".join(f"{line}\n" for line in lines).encode()
    # The window spans all runs: what they share is there once.
    parameters = zstandard.ZstdCompressionParameters.from_level(19, window_log=24, write_checksum=True)
    write_bytes(path, zstandard.ZstdCompressor(compression_params=parameters).compress(content))


def read_results(path: Path) -> ExperimentResults:
    """Results as ``write_results`` kept them. UserError if the file is none, or damaged."""
    file = path / RESULTS_NAME if path.is_dir() else path
    try:
        with open_file(file) as (content, _):
            lines = read_lines(file, content, LARGEST_BYTES)
            head = parse_json(next(lines, b""))
            if head.get("format") != FORMAT:
                raise UserError(f"{file}: format {head.get('format')!r} is not known here")
            json.dumps(head, ensure_ascii=False).encode()  # half characters, which nothing can print
            made = msgspec.convert(head, Head).made
            question = Question.of(head["question"], str(file))
            runs = [_run(parse_json(line), question, file) for line in lines]
            if not runs or len({(run.arm, run.seed) for run in runs}) < len(runs):
                raise UserError(f"{file}: damaged: {'it has a run twice' if runs else 'it has no run'}")
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: damaged: not the results of an experiment: {error}") from None
    return ExperimentResults(question, made, runs)


def joined(ours: ExperimentResults, other: ExperimentResults, where: Path) -> ExperimentResults:
    """Our runs, and those of the others, as kept in the file ``where``, that have another arm or seed.

    UserError if the others are of another question, or if an arm has other settings there: a mean over both would be of
    neither. Places and engines' layouts may differ, and keys that only one version has.
    """
    if (other.question.name, other.question.arms) != (ours.question.name, ours.question.arms):
        raise UserError(f"{where}: results of another experiment, {other.question.name}, or of one with other arms")
    known = {(run.arm, run.seed) for run in ours.runs}
    settings = {run.arm: _settings(run.data.config) for run in ours.runs}
    added = [run for run in other.runs if (run.arm, run.seed) not in known]
    for run in added:
        there, here = _settings(run.data.config), settings.get(run.arm, {})
        for key in sorted(there.keys() & here.keys()):
            if there[key] != here[key]:
                name = run_name(run.arm, run.seed)
                raise UserError(f"{where}: {name}: {key} is {there[key]} there, {here[key]} here")
    order = list(ours.question.arms)
    runs = sorted([*ours.runs, *added], key=lambda run: (order.index(run.arm), run.seed))
    made = ours.made | ({"runs of other machines": len(added)} if added else {})
    return ExperimentResults(ours.question, made, runs)


def _settings(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings by dotted key, without the run's own and those of PLACES; only of the sections that are kept."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key in PLACES or (not prefix and key not in SECTIONS):
            continue
        if isinstance(value, Mapping):
            found |= _settings(value, f"{prefix}{key}.")
        elif not (isinstance(value, str) and "/" in value):  # a path
            found[prefix + key] = value
    return found


def _kept(run: ExperimentRun, root: str) -> dict[str, Any]:
    data = run.data
    config = {name: data.config[name] for name in SECTIONS if name in data.config}
    config["run"] = {"seed": run.seed}
    return {
        "arm": run.arm,
        "seed": run.seed,
        "config": _without_places(config, root),
        "done": sorted(data.done),
        "history": {stage: _columns(rows) for stage, rows in data.history.items()},
        "profiles": [_rounded(record) for record in _first_middle_last(data.profiles)],
        "results": _rounded(data.results),
    }


def _run(line: Any, question: Question, file: Path) -> ExperimentRun:
    """ValueError, or UserError, if the line does not hold what ``_kept`` makes of a run."""
    msgspec.convert(line, KeptRun)
    if not all(map(is_profile, line["profiles"])):
        raise ValueError("a profile without lists of numbers")
    check_settings(line["config"], file)
    arm, seed = line["arm"], line["seed"]
    data = RunData(
        name=run_name(arm, seed),
        color=arm_color(question, arm),
        config=line["config"],
        stages=line["config"].get("stages") or [],
        done=frozenset(line["done"]),
        history={stage: _rows(columns) for stage, columns in line["history"].items()},
        profiles=line["profiles"],
        results=line["results"],
    )
    return ExperimentRun(arm, seed, data)


def _columns(rows: Sequence[Mapping[str, float]]) -> dict[str, list[float | None]]:
    names = dict.fromkeys(name for row in rows for name in row if name in TIMES or not name.startswith(NOT_KEPT))
    return {name: [_rounded(row.get(name)) for row in rows] for name in names}


def _rows(columns: Mapping[str, Sequence[float | None]]) -> list[dict[str, float]]:
    """ValueError unless all columns are as long as that of the iterations, which has no gap."""
    if not columns:
        return []
    count = len(columns["iteration"])
    if None in columns["iteration"] or any(len(column) != count for column in columns.values()):
        raise ValueError("columns of different lengths, or iterations without a number")
    return [{name: y for name, column in columns.items() if (y := column[i]) is not None} for i in range(count)]


def _first_middle_last(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    picked = records[:1] + records[len(records) // 2 :][:1] + records[-1:]
    return list({record["iteration"]: record for record in picked}.values())


def _rounded(value: Any) -> Any:
    """Numbers to DIGITS digits; what is not finite, or beyond LARGEST, is None."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if abs(value) <= LARGEST else None
    if isinstance(value, Mapping):
        return {key: _rounded(part) for key, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, list) else value


def _without_places(value: Any, root: str) -> Any:
    """Absolute paths become relative to the folder of the experiments, or, outside of it, their last part."""
    if isinstance(value, str) and value.startswith("/"):
        path = Path(value)
        return path.relative_to(root).as_posix() if root and path.is_relative_to(root) else path.name
    if isinstance(value, Mapping):
        return {key: _without_places(part, root) for key, part in value.items()}
    return [_without_places(part, root) for part in value] if isinstance(value, list) else value
