"""configs/experiments/NAME.yaml: arms, what they share, and the question; into chains of stages, which share nothing
else.

Folders below DIR, by default runs/experiments, which all experiments have in common:

    tasks/TASK                   what `vcppo make-task` made
    shared/CONFIG/seed_0         the stages that arms begin with, of a configuration file and a task
    NAME/ARM/seed_0              a run per arm and seed, or a link to an equal one of another experiment
    NAME/experiment.jsonl.zst    the numbers (report/experiment_results.py), and the report next to them
"""

import json
import re
import typing
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_vcppo.config import Config
from megatron_vcppo.config.keys import all_keys, nearest_key
from megatron_vcppo.config.load import load_stored_config
from megatron_vcppo.config.schema import Stage
from megatron_vcppo.config.value_sources import CONFIGS, command_line_source, file_sources, path_override
from megatron_vcppo.errors import UserError
from megatron_vcppo.report.experiment_question import Question, one_line
from megatron_vcppo.report.run_charts import file_name
from megatron_vcppo.report.run_data import differences_of
from megatron_vcppo.run.files import read_bytes
from megatron_vcppo.run.folder import RunFolder
from megatron_vcppo.tasks.generate import TASKS
from megatron_vcppo.tasks.options import check_arguments

FOLDER = CONFIGS / "experiments"
KEYS = {"title", "question", "task", "config", "set", "shared", "arms", "claims", "figures", "outcomes", "against"}
TASK_OPTIONS = {
    "steps", "mistake_rate", "demonstrations", "validation", "prompts", "test", "family", "layers", "width",
    "head_size", "max_length", "seed",
}  # fmt: skip
"""Of ``vcppo make-task``, besides its name and kinds."""
OWN = "own"
"""In an arm, next to its dotted keys: shared stages that it runs itself."""
SHARED_KEYS = {"stages", "per_seed", "set"}
SET_BY_THE_COMMAND = {"dir": "--dir", "seed": "--seeds"}
"""Key of the section run → the option that it follows from."""
COMMON_FOLDERS = ("shared", "tasks")
"""In DIR, next to those of the experiments."""
MAX_NAME = 100
"""Characters of a folder's name."""
COMMON_SECTIONS = ("model", "prompts", "rollout", "rewards", "returns", "values")
"""Of the configuration: what every stage depends on, besides its own section."""


@dataclass(frozen=True)
class Arm:
    """One arm, the same for all seeds. Example: ``Arm("plain PPO", ("ppo.critic.init=reward_model",))``."""

    name: str
    overrides: tuple[str, ...]
    own: tuple[str, ...] = ()
    """Stages that the others share and this arm runs itself."""

    @property
    def folder(self) -> str:
        """Its name as a folder's."""
        return file_name(self.name)


@dataclass(frozen=True)
class Experiment:
    """An experiment file, checked."""

    name: str
    file: Path
    question: Question
    config: Path
    overrides: tuple[str, ...]
    """Of every arm."""
    shared_overrides: tuple[str, ...]
    """Of every run, the shared ones too; arms override them."""
    task: str | None
    """Name of the synthetic task in DIR/tasks; None: the configuration names its own data."""
    task_arguments: tuple[str, ...]
    """Of ``vcppo make-task``, without --out."""
    shared_stages: tuple[str, ...]
    """Stages that arms take from a shared run, as far as an arm's own chain begins with them."""
    per_seed: bool
    """Whether each seed has its own shared run; otherwise all take that of seed 0."""
    arms: tuple[Arm, ...]

    def shared_seed(self, seed: int) -> int:
        """The seed of the shared run that a seed's arms begin with."""
        return seed if self.per_seed else 0

    def shared_run(self, root: Path, seed: int) -> Path:
        """The folder of the shared run that a seed's arms begin with."""
        name = "_".join(filter(None, (self.config.stem, self.task if self.task != self.config.stem else None)))
        return root / "shared" / name / f"seed_{self.shared_seed(seed)}"

    def arm_run(self, root: Path, arm: Arm, seed: int) -> Path:
        """The folder of one run."""
        return root / self.name / arm.folder / f"seed_{seed}"

    def task_folder(self, root: Path) -> Path | None:
        """Where the synthetic task is."""
        return root / "tasks" / self.task if self.task else None

    def data_overrides(self, root: Path) -> list[str]:
        """The keys that name the task's files."""
        folder = self.task_folder(root)
        if folder is None:
            return []
        files = {
            "model.hf": "base_model",
            "sft.train": "sft_train.jsonl",
            "sft.validation": "sft_validation.jsonl",
            "prompts.train": "prompts_train.jsonl",
            "prompts.test": "prompts_test.jsonl",
        }
        return [path_override(key, (folder / file).absolute()) for key, file in files.items()]

    def num_taken(self, arm: Arm, stages: Sequence[str]) -> int:
        """How many of the first stages of an arm's chain come from the shared run."""
        taken = 0
        while taken < len(stages) and stages[taken] in self.shared_stages and stages[taken] not in arm.own:
            taken += 1
        return taken


def find_experiment(name: str) -> Path:
    """The file of NAME, or a path. UserError lists the experiments that there are."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.yaml")))
        raise UserError(f"experiment {name}: no such file; there are {known}, or give a YAML file")
    return path


def read_experiment(path: Path) -> Experiment:
    """Read and check an experiment file. UserError naming the file and what is wrong in it."""
    if path.stem in COMMON_FOLDERS or not path.stem.strip("."):
        raise UserError(f"{path}: DIR/{path.stem} cannot be an experiment's folder: choose another name for the file")
    values = _values(path)
    _only_known(values, KEYS, str(path))
    if missing := sorted({"title", "config", "arms"} - set(values)):
        raise UserError(f"{path}: {missing[0]} is missing")
    arms = _section(values, "arms", path)
    if not arms:
        raise UserError(f"{path}: arms is empty")
    task, shared = _section(values, "task", path), _section(values, "shared", path)
    _only_known(task, {"name", "kinds"} | TASK_OPTIONS, f"{path}: task")
    _only_known(shared, SHARED_KEYS, f"{path}: shared")
    if not isinstance(values["config"], str):
        raise UserError(f"{path}: config must name a file, got {values['config']!r}")
    stages, per_seed = _shared_stages(shared.get("stages"), f"{path}: shared.stages"), shared.get("per_seed", True)
    if not isinstance(per_seed, bool):
        raise UserError(f"{path}: shared.per_seed must be true or false, got {per_seed!r}")
    made = tuple(_arm(name, overrides, stages, path) for name, overrides in arms.items())
    if len({arm.folder for arm in made}) < len(made):
        raise UserError(f"{path}: two arms have the same name but for punctuation")
    about = {"name": path.stem, "shared": _shared_text(stages, per_seed)}
    question = Question.of(values | about, str(path))
    _check_figures(question, path)
    return Experiment(
        name=path.stem,
        file=path,
        question=question,
        config=_config_file(values["config"], path),
        overrides=_overrides(values.get("set"), f"{path}: set"),
        shared_overrides=_overrides(shared.get("set"), f"{path}: shared.set"),
        task=None if values.get("task") is None else _task_name(task, f"{path}: task"),
        task_arguments=() if values.get("task") is None else _task_arguments(task, f"{path}: task"),
        shared_stages=stages,
        per_seed=per_seed,
        arms=made,
    )


def check_settings(run: RunFolder, config: Config, stages: Sequence[str]) -> None:
    """UserError if the run was begun with other settings of these stages: its numbers would be of both.

    Layouts, clusters and the places of files may change.
    """
    if not run.config.exists():
        return
    stored = asdict(load_stored_config(run.config))
    sections = [*COMMON_SECTIONS, *(stage for stage in stages if stage not in ("export", "evaluate"))]
    ours, now = ({name: one.get(name) for name in sections} for one in (stored, asdict(config)))
    changed = {key: both for key, both in differences_of([ours, now]).items() if not key.startswith(NOT_COMPARED)}
    if changed:
        key, (before, after) = next(iter(changed.items()))
        raise UserError(
            f"{run.path}: was begun with {key}={before}, now it is {after}: choose another --dir, remove that run, or "
            f"give {key}={before}"
        )


def check_taken(where: str, config: Config, shared: Config, stages: Sequence[str]) -> None:
    """UserError if an arm has other settings of stages that it takes from the shared run: they would have no effect.

    where: names the file and the arm.
    """
    for stage in stages:
        both = [{stage: asdict(one).get(stage)} for one in (shared, config)]
        changed = {key: row for key, row in differences_of(both).items() if not key.startswith(NOT_COMPARED)}
        if changed:
            key, (theirs, ours) = next(iter(changed.items()))
            raise UserError(
                f"{where}: {key} is {ours}, but {stage} is shared and has {theirs}: add own: [{stage}] to the arm, or "
                "set the key for all in shared.set"
            )


PLACES = ("model.hf", "sft.train", "sft.validation", "prompts.train", "prompts.test", "value_pretrain.stored_path")
NOT_COMPARED = (*PLACES, "rollout.engine.")
"""Beginnings of keys."""


def equal_run(
    root: Path, run: RunFolder, config: Config, base: RunFolder | None = None, taken: Sequence[str] = ()
) -> RunFolder | None:
    """A finished run below root, of whatever experiment, with the settings, data and seed of ``run``; None: there is
    none. Layouts may differ. base, taken: the run that it would begin with, and the stages: they must be the same."""
    wanted = _numbers_of(config, run)
    for folder in sorted(root.glob(f"*/*/{run.path.name}")):
        found = RunFolder(folder)
        if folder.is_symlink() or not all(found.stage(stage).marked_done() for stage in config.stages):
            continue
        if base is not None and not all(same_file(base.stage(s).manifest, found.stage(s).manifest) for s in taken):
            continue
        with suppress(UserError):  # what is wrong with another experiment's run is not this one's concern
            if _numbers_of(load_stored_config(found.config), found) == wanted:
                return found
    return None


def same_file(one: Path, other: Path) -> bool:
    """Whether both are there and hold the same."""
    return one.exists() and other.exists() and read_bytes(one) == read_bytes(other)


def _numbers_of(config: Config, run: RunFolder) -> Any:
    """What a run's numbers depend on, as JSON, without its own place and the engines' layout."""
    values = asdict(config)
    del values["rollout"]["engine"]
    found = {name: values.get(name) for name in (*COMMON_SECTIONS, *config.stages, "stages")}
    found["seed"] = config.run.seed
    return json.loads(json.dumps(found, ensure_ascii=False).replace(str(run.path), ""))


def _values(path: Path) -> dict[str, Any]:
    """The file merged onto those that it includes; interpolations stay as they are written."""
    sources = file_sources(path)
    try:
        merged = OmegaConf.merge(*(source.values for source in sources))
        return typing.cast(dict[str, Any], OmegaConf.to_container(merged, resolve=False))
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from None


def _arm(name: Any, values: Any, shared_stages: Sequence[str], path: Path) -> Arm:
    if isinstance(name, bool) or not isinstance(name, str | int | float):
        raise UserError(f"{path}: arm {name!r}: a name must be text: put it in quotes")
    if not str(name).isprintable():
        raise UserError(f"{path}: arm {name!r}: its name must be one line of plain text")
    if not 0 < len(file_name(str(name))) <= MAX_NAME:
        raise UserError(f"{path}: arm {name!r}: its name needs a letter or a digit, and at most {MAX_NAME} of them")
    where = f"{path}: arm {name}"
    if not isinstance(values, Mapping | None):
        raise UserError(f"{where}: expected keys and values, got {values!r}")
    overrides = dict(values or {})
    own = overrides.pop(OWN, [])
    if not isinstance(own, list):
        raise UserError(f"{where}: {OWN} must be a list of shared stages, got {own!r}")
    if unknown := [stage for stage in own if stage not in shared_stages]:
        raise UserError(f"{where}: {OWN} names {one_line(unknown[0])}, which is not among the shared stages")
    return Arm(str(name), _overrides(overrides, where), tuple(own))


def _shared_stages(stages: Any, where: str) -> tuple[str, ...]:
    """Checked: each once, in the order of a chain, in which those that train nothing have no fixed place."""
    known = typing.get_args(Stage)
    if stages is None:
        return ()
    if not isinstance(stages, list):
        raise UserError(f"{where} must be a list such as [sft, reward_model], got {stages!r}")
    if unknown := [stage for stage in stages if stage not in known]:
        raise UserError(f"{where}: no stage {unknown[0]!r}; there are {', '.join(known)}")
    trained = [stage for stage in known if stage not in ("evaluate", "export")]
    in_order = [stage for stage in trained if stage in stages]
    if len(set(stages)) < len(stages) or [stage for stage in stages if stage in trained] != in_order:
        raise UserError(f"{where}: name each once, in the order of a chain: {', '.join(trained)}")
    return tuple(stages)


def _check_figures(question: Question, path: Path) -> None:
    """UserError for a figure of a key or a stage that no configuration has."""
    stages = typing.get_args(Stage)
    for figure in question.figures:
        key, stage = figure.get("setting"), figure.get("stage", "ppo")
        if key is not None and key not in all_keys():
            near = nearest_key(key)
            advice = f": did you mean {near}?" if near else "; vcppo config --explain lists them"
            raise UserError(f"{path}: figure {figure!r}: no configuration key {one_line(key)}{advice}")
        if stage not in stages:
            raise UserError(f"{path}: figure {figure!r}: no stage {stage!r}; there are {', '.join(stages)}")


def _section(values: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    section = values.get(name)
    if not isinstance(section, dict | None):
        raise UserError(f"{path}: {name} must hold keys and values, got {section!r}")
    return section or {}


def _only_known(section: Mapping[str, Any], known: set[str], where: str) -> None:
    if unknown := [key for key in section if key not in known]:
        raise UserError(f"{where}: unknown key {one_line(unknown[0])}; there are {', '.join(sorted(known))}")


def _overrides(values: Any, where: str) -> tuple[str, ...]:
    """key=value arguments from dotted keys. UserError for those that the command sets itself."""
    if not isinstance(values, Mapping | None):
        raise UserError(f"{where}: expected keys and values, got {values!r}")
    overrides = tuple(f"{key}={_value_text(value, f'{where}: {key}')}" for key, value in (values or {}).items())
    try:
        given = command_line_source(overrides).values
        run = typing.cast(dict[str, Any], OmegaConf.to_container(given, resolve=False)).get("run")
    except OmegaConfBaseException as error:
        raise UserError(f"{where}: {str(error).splitlines()[0]}") from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    for key, option in SET_BY_THE_COMMAND.items():
        if isinstance(run, dict) and key in run:
            raise UserError(f"{where}: run.{key} follows from {option} of the command: leave it out")
    return overrides


def _value_text(value: Any, where: str) -> str:
    try:
        return value if isinstance(value, str) else json.dumps(value)
    except TypeError:
        raise UserError(f"{where}: no value of a configuration: {value!r}") from None


def _config_file(name: str, path: Path) -> Path:
    file = name if name.endswith((".yaml", ".yml")) else f"{name}.yaml"
    for folder in (path.parent, CONFIGS):
        if (folder / file).is_file():
            return folder / file
    raise UserError(f"{path}: config {one_line(name)}: no such file in {path.parent} or {CONFIGS}")


def _task_name(task: Mapping[str, Any], where: str) -> str:
    name = task.get("name")
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w. +-]*", name) or len(name) > MAX_NAME:
        raise UserError(
            f"{where} needs a name, which is that of its folder: letters, digits, _ and -, at most {MAX_NAME}, "
            f"got {name!r}"
        )
    return name


def _task_arguments(task: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Of ``vcppo make-task``, checked as it checks them."""
    kinds = task.get("kinds", ["running_sum"])
    if not isinstance(kinds, list) or not kinds:
        raise UserError(f"{where}: kinds must be a list such as [running_sum], got {kinds!r}")
    if unknown := [kind for kind in kinds if kind not in list(TASKS)]:
        raise UserError(f"{where}: no kind {unknown[0]!r}; there are {', '.join(TASKS)}")
    arguments = ["--task", *kinds]
    for key in sorted(TASK_OPTIONS & set(task)):
        values = task[key] if isinstance(task[key], list) else [task[key]]
        if wrong := [value for value in values if isinstance(value, str) and value.startswith("-")]:
            raise UserError(f"{where}: {key}: no value of this option: {wrong[0]!r}")
        arguments += [f"--{key.replace('_', '-')}", *map(str, values)]
    try:
        check_arguments(arguments)
    except UserError as error:
        raise UserError(f"{where}: vcppo make-task: {error}") from None
    return tuple(arguments)


def _shared_text(stages: Sequence[str], per_seed: bool) -> str:
    if not stages:
        return "The arms share no stage."
    seeds = "each seed has its own" if per_seed else "one for all seeds, which vary what follows"
    return f"Shared by all arms whose chain begins with them: {', '.join(stages)} ({seeds})."
