"""configs/experiments/NAME.yaml: arms, what they share, and the question; into chains of stages, which share nothing
else.

Folders below DIR, by default runs/experiments, which all experiments have in common:

    tasks/TASK                   what `vcppo make-task` made
    shared/CONFIG/seed_0         the stages that arms begin with, of a configuration file and a task
    NAME/ARM/seed_0              a run per arm and seed, or a link to an equal one of another experiment
    NAME/experiment.jsonl.zst    the numbers (report/experiment_results.py), and the report next to them
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from megatron_vcppo.config import Config
from megatron_vcppo.config.load import load_stored_config
from megatron_vcppo.config.value_sources import CONFIGS, file_sources, path_override
from megatron_vcppo.errors import UserError
from megatron_vcppo.report.experiment_question import Question
from megatron_vcppo.report.run_charts import file_name
from megatron_vcppo.report.run_data import differences_of
from megatron_vcppo.run.files import read_bytes
from megatron_vcppo.run.folder import RunFolder

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
    merged = OmegaConf.merge(*(source.values for source in file_sources(path)))
    values: dict[str, Any] = OmegaConf.to_container(merged, resolve=False)  # type: ignore[assignment]
    if unknown := sorted(set(values) - KEYS):
        raise UserError(f"{path}: unknown key {unknown[0]}; there are {', '.join(sorted(KEYS))}")
    if missing := sorted({"title", "config", "arms"} - set(values)):
        raise UserError(f"{path}: {missing[0]} is missing")
    arms = _section(values, "arms", path)
    if not arms:
        raise UserError(f"{path}: arms is empty")
    task, shared = _section(values, "task", path), _section(values, "shared", path)
    _only_known(task, {"name", "kinds"} | TASK_OPTIONS, f"{path}: task")
    _only_known(shared, SHARED_KEYS, f"{path}: shared")
    common = _section(values, "set", path)
    made = tuple(_arm(str(name), overrides, shared, path) for name, overrides in arms.items())
    if len({arm.folder for arm in made}) < len(made):
        raise UserError(f"{path}: two arms have the same name but for punctuation")
    stages, per_seed = tuple(shared.get("stages") or ()), bool(shared.get("per_seed", True))
    about = {"name": path.stem, "shared": _shared_text(stages, per_seed)}
    return Experiment(
        name=path.stem,
        file=path,
        question=Question.of(values | about, str(path)),
        config=_config_file(str(values["config"]), path),
        overrides=_overrides(common, f"{path}: set"),
        shared_overrides=_overrides(shared.get("set"), f"{path}: shared.set"),
        task=str(task["name"]) if task else None,
        task_arguments=_task_arguments(task, path) if task else (),
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


def _arm(name: str, values: Any, shared: Mapping[str, Any], path: Path) -> Arm:
    overrides = dict(values) if isinstance(values, Mapping) else values
    own = overrides.pop(OWN, []) if isinstance(overrides, dict) else []
    if unknown := [stage for stage in own if stage not in (shared.get("stages") or ())]:
        raise UserError(f"{path}: arm {name}: {OWN} names {unknown[0]}, which is not among the shared stages")
    return Arm(name, _overrides(overrides, f"{path}: arm {name}"), tuple(own))


def _section(values: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    section = values.get(name) or {}
    if not isinstance(section, dict):
        raise UserError(f"{path}: {name} must hold keys and values, got {section!r}")
    return section


def _only_known(section: Mapping[str, Any], known: set[str], where: str) -> None:
    if unknown := sorted(set(section) - known):
        raise UserError(f"{where}: unknown key {unknown[0]}; there are {', '.join(sorted(known))}")


def _overrides(values: Any, where: str) -> tuple[str, ...]:
    """key=value arguments from dotted keys."""
    if not isinstance(values, Mapping | None):
        raise UserError(f"{where}: expected keys and values, got {values!r}")
    return tuple(
        f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in (values or {}).items()
    )


def _config_file(name: str, path: Path) -> Path:
    file = name if name.endswith((".yaml", ".yml")) else f"{name}.yaml"
    for folder in (path.parent, CONFIGS):
        if (folder / file).is_file():
            return folder / file
    raise UserError(f"{path}: config {name}: no such file in {path.parent} or {CONFIGS}")


def _task_arguments(task: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    if "name" not in task or Path(str(task["name"])).name != str(task["name"]):
        raise UserError(f"{path}: task needs a name, which is that of its folder, got {task.get('name')!r}")
    arguments = ["--task", *map(str, task.get("kinds") or ["running_sum"])]
    for key in sorted(TASK_OPTIONS & set(task)):
        values = task[key] if isinstance(task[key], list) else [task[key]]
        arguments += [f"--{key.replace('_', '-')}", *map(str, values)]
    return tuple(arguments)


def _shared_text(stages: Sequence[str], per_seed: bool) -> str:
    if not stages:
        return "The arms share no stage."
    seeds = "each seed has its own" if per_seed else "one for all seeds, which vary what follows"
    return f"Shared by all arms whose chain begins with them: {', '.join(stages)} ({seeds})."
