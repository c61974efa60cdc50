"""What a run left on disk, read for a report: whatever is not there yet is empty."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
import yaml

from megatron_vcppo.algo.failure_signatures import Finding, diagnose
from megatron_vcppo.config.keys import with_new_names
from megatron_vcppo.errors import UserError
from megatron_vcppo.report.samples import Samples
from megatron_vcppo.rewards.verifier import NO_ANSWER
from megatron_vcppo.run.files import read_json, read_text
from megatron_vcppo.run.folder import RunFolder
from megatron_vcppo.run.metrics_log import read_history, read_records

COLORS = ("#0072b2", "#d55e00", "#009e73", "#7b3294", "#b8860b", "#c2255c", "#4d4d4d", "#2aa1d8",
          "#6b3e12", "#7fb800", "#f781bf", "#1b2a80")  # fmt: skip
"""One per run, a thirteenth run has the first one's again. First Okabe and Ito's, which color-blind readers tell apart,
with those that are too light for a line on white darkened."""

LARGEST = 1e100
"""Larger numbers are damage: their squares would have none to stand for them."""
Number = Annotated[float, msgspec.Meta(ge=-LARGEST, le=LARGEST)]
History = list[dict[str, float]]
Profile = dict[str, Number | list[Number | None] | None]
COMPUTED_WITH = (
    "rollout.max_tokens",
    "ppo.iterations",
    "ppo.critic_only_iterations",
    "ppo.loss.kl_coef",
    "returns.overlong_penalty_tokens",
    "rewards.model.clip",
    "rewards.model.weight",
    "rewards.model.verifier_weight",
)
"""The settings that a report computes with."""


class Scores(msgspec.Struct):
    """What ``stages/held_out.py`` makes of a set of problems; ``pass`` and ``maj``: estimate, half width, ends."""

    avg: Number
    avg_interval: Number
    length_mean: Number
    truncated_share: Number
    avg_range: Annotated[list[Number], msgspec.Meta(max_length=2)] = []
    pass_at: dict[str, "Estimate"] = msgspec.field(default_factory=dict, name="pass")
    maj: dict[str, "Estimate"] = {}


class Result(Scores, kw_only=True):
    """A row of the evaluation, a checkpoint's."""

    name: str
    tasks: dict[str, Scores] = {}


Estimate = Annotated[list[Number], msgspec.Meta(min_length=2, max_length=4)]


@dataclass(frozen=True)
class RunData:
    """One run as the report shows it."""

    name: str
    color: str
    config: dict[str, Any]
    """The resolved configuration, without the values of cluster.environment."""
    stages: list[str]
    done: frozenset[str]
    """The stages whose manifest stands."""
    history: dict[str, History]
    """Stage → its metrics, oldest first; stages without any are not in it."""
    profiles: list[dict[str, Any]]
    """One per PPO iteration, oldest first."""
    results: list[dict[str, Any]]
    """The rows of the evaluation."""
    samples: list[Samples] = field(default_factory=list)

    def series(self, stage: str, metric: str) -> list[tuple[float, float]]:
        """(iteration, value) of every record of a stage that has the metric."""
        rows = self.history.get(stage, [])
        return [(row["iteration"], row[metric]) for row in rows if metric in row]

    def findings(self) -> list[Finding]:
        """The diagnosis of the PPO stage."""
        return diagnose(self.history.get("ppo", []), worst_reward(self.config))


def read_run(
    path: Path, name: str, color: str, done: frozenset[str] = frozenset(), samples: Sequence[Samples] = ()
) -> RunData:
    """Read a run folder. Raises UserError if it is none, or if a file in it cannot be read."""
    config = read_config(path)
    run = RunFolder(path)
    stages = [str(stage) for stage in config.get("stages") or []]
    names = dict.fromkeys([*stages, *(stage.name for stage in run.stages())])
    history = {name: rows for name in names if (rows := _drawable(read_history(run.stage(name).path)))}
    found = filter(is_profile, read_records(run.stage("ppo").profiles))
    by_iteration = {record["iteration"]: record for record in found}
    profiles = [by_iteration[iteration] for iteration in sorted(by_iteration)]
    results = read_results(run.stage("evaluate").results)
    return RunData(name, color, config, stages, done, history, profiles, results, list(samples))


def read_config(path: Path) -> dict[str, Any]:
    """The resolved configuration of a run folder; UserError if the folder is no run."""
    file = RunFolder(path).config
    if not file.is_file():
        raise UserError(f"{path}: not a run folder: it has no {file.name}")
    try:
        config = yaml.safe_load(read_text(file))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read as YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(config, dict):
        raise UserError(f"{file}: not a configuration: it holds no keys")
    config = with_new_names(config)
    check_settings(config, file)
    environment = (config.get("cluster") or {}).get("environment")
    if environment:  # a user's variables are not for a page that is sent around
        config["cluster"]["environment"] = dict.fromkeys(environment, "(not shown)")
    return config


def check_settings(config: dict[str, Any], where: Path) -> None:
    """UserError naming ``where`` if a report cannot compute with the configuration."""
    for key in COMPUTED_WITH:
        value = setting(config, key)
        if value is not None and not (isinstance(value, int | float) and abs(value) <= LARGEST):
            raise UserError(f"{where}: {key} is no number: {str(value)[:40]!r}")


def setting(config: dict[str, Any], key: str) -> Any:
    """The value of a dotted key, None if the configuration does not have it."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def worst_reward(config: dict[str, Any]) -> float | None:
    """The lowest return that a response can have; None if a KL divergence in the rewards, or the scores of a reward
    model, leave it open."""
    if setting(config, "ppo.loss.kl_coef") and setting(config, "ppo.loss.kl_in") == "reward":
        return None
    worst = NO_ANSWER.reward
    if setting(config, "rewards.model.path") or setting(config, "rewards.model.stage"):
        numbers = [setting(config, f"rewards.model.{name}") for name in ("verifier_weight", "weight", "clip")]
        if None in numbers:
            return None
        verifier_weight, weight, clip = numbers
        worst = verifier_weight * worst - weight * clip
    return worst - bool(setting(config, "returns.overlong_penalty_tokens"))


def differences(runs: Sequence[RunData]) -> dict[str, list[Any]]:
    """Dotted key → its value in each run, of the keys that are not the same in all."""
    return differences_of([run.config for run in runs])


def differences_of(configs: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """The same of configurations."""
    flat = [dict(_leaves(config)) for config in configs]
    keys = dict.fromkeys(key for one in flat for key in one)
    values = {key: [one.get(key) for one in flat] for key in keys}
    return {key: row for key, row in values.items() if any(value != row[0] for value in row)}


def _leaves(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(value, dict) or not value:
        return [(prefix, value)]
    return [leaf for key, part in value.items() for leaf in _leaves(part, f"{prefix}.{key}" if prefix else str(key))]


def _drawable(history: History) -> History:
    """Numbers beyond LARGEST become infinities, which no chart draws."""
    return [
        {name: math.copysign(math.inf, y) if abs(y) > LARGEST else y for name, y in record.items()}
        for record in history
    ]


def is_profile(record: dict[str, Any]) -> bool:
    """Whether a record of profiles.jsonl has an iteration, and lists of numbers and nulls by position or decile."""
    try:
        numbers = msgspec.convert(record, Profile)
    except msgspec.ValidationError:
        return False
    is_list = all(isinstance(value, list) for name, value in numbers.items() if "_by_" in name)
    return is_list and isinstance(numbers.get("iteration"), float)


def read_results(file: Path) -> list[dict[str, Any]]:
    """The rows of the evaluation, a checkpoint each; empty before it is done. UserError if the file is damaged."""
    try:
        found: list[dict[str, Any]] = read_json(file)
        msgspec.convert(found, list[Result])
    except FileNotFoundError:
        return []
    except msgspec.ValidationError as error:
        raise UserError(f"{file}: not the results of an evaluation: {error}") from None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{file}: cannot be read as JSON: {error}") from None
    return found
