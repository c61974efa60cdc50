"""The metrics log of a stage: metrics.jsonl, one JSON object per iteration; Weights & Biases and TensorBoard if
requested.

One rank logs; the caller decides which. After a resume the log continues as if nothing had happened: what was logged
beyond the resumed checkpoint is dropped, because it will be logged again.
"""

import math
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_vcppo.config import Config
from megatron_vcppo.errors import UserError
from megatron_vcppo.run.files import (
    append_json_line,
    parse_json_line,
    read_bytes,
    read_json_lines,
    read_text,
    write_bytes,
    write_text,
)
from megatron_vcppo.run.folder import StageFolder
from megatron_vcppo.run.log import say
from megatron_vcppo.run.tensorboard_log import start_tensorboard

LONGEST_PIECE = "stopping/longest_piece_s"
"""The longest time between two points at which a stage could stop on request, since the record before."""
SAVE_TIME = "stopping/save_s"
"""How long the newest complete checkpoint took, until its files were written and checked."""
WANDB_ID_NAME = "wandb_run_id"
WANDB_INIT_TIMEOUT_S = 60.0
NOT_FOR_A_WEB_PAGE = ("environment", "setup", "sbatch", "srun")
"""Keys of the section cluster."""


class MetricsLog:
    """Append-only ``folder/metrics.jsonl``; every line is with the operating system when ``log`` returns."""

    def __init__(
        self, folder: Path, config: Config, stage: str, resume_iteration: int = 0, total_iterations: int | None = None
    ) -> None:
        """Open the log of a stage, cut back to ``resume_iteration``.

        ``total_iterations`` is repeated in every record, for those who show how far the stage is.
        Raises UserError if run.wandb is online and Weights & Biases cannot be reached or has no key, or if
        run.tensorboard is true without the package.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.total_iterations = total_iterations
        self._path = StageFolder(folder).metrics
        cut_back(self._path, resume_iteration)
        self._tensorboard = start_tensorboard(folder, config, resume_iteration)
        self._wandb = start_wandb(folder, config, stage)

    def log(self, iteration: int, metrics: Mapping[str, float | int | str]) -> None:
        """Write one record; iterations must not go backwards. NaN and infinities are written as words."""
        record: dict[str, Any] = {"iteration": iteration, "timestamp": round(time.time(), 3)}
        if self.total_iterations is not None:
            record["total_iterations"] = self.total_iterations
        record |= {name: _plain(value) for name, value in metrics.items()}
        append_json_line(self._path, record)
        if self._tensorboard is not None:
            self._tensorboard.log(iteration, metrics)
        if self._wandb is not None:
            self._wandb.log(dict(metrics), step=iteration)

    def close(self, exit_code: int = 0) -> None:
        """Finish; safe to call twice."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            import wandb

            self._wandb.finish(exit_code=exit_code)
            self._wandb = None
            wandb.teardown()  # its service writes the file after it has answered; a rank's end would not wait for it

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(exit_code=0 if kind is None else 1)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The complete records of a stage's log, oldest first; empty if there is none. A torn last line is dropped."""
    return read_records(StageFolder(folder).metrics)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The complete records of a file of one JSON object with an iteration per line; empty if there is none."""
    return [record for record in read_json_lines(path) if _is_record(record)]


def read_history(folder: Path) -> list[dict[str, float]]:
    """The records of a stage's log as numbers: NaN and infinities are numbers again, text is dropped."""
    return [
        {name: number for name, value in record.items() if (number := _number(value)) is not None}
        for record in read_metrics(folder)
    ]


def cut_back(path: Path, iteration: int) -> None:
    """Drop the records after ``iteration`` and lines that are none, such as one torn by a kill; says how many."""
    lines = read_bytes(path).splitlines(keepends=True) if path.exists() else []
    records = [(line, parse_json_line(line)) for line in lines]
    kept = [line for line, record in records if record and _is_record(record) and record["iteration"] <= iteration]
    if num_dropped := len(lines) - len(kept):
        write_bytes(path, b"".join(kept))
        say(f"{path}: dropped {num_dropped} of {len(lines)} lines, resuming at iteration {iteration}")


def start_wandb(folder: Path, config: Config, stage: str) -> Any:
    """A run of Weights & Biases, the same one after a resume; None if run.wandb is off."""
    if config.run.wandb == "off":
        return None
    import wandb

    if config.run.wandb == "online" and not wandb.api.api_key:
        raise UserError("run.wandb is online, but there is no API key: `wandb login`, or set run.wandb=offline")
    run_name = Path(config.run.dir).name
    try:
        return wandb.init(
            project=config.run.wandb_project,
            id=_wandb_id(folder / WANDB_ID_NAME),
            resume="allow",
            mode=config.run.wandb,
            dir=str(folder),
            name=f"{run_name}/{stage}",
            group=run_name,
            job_type=stage,
            config=_for_a_web_page(config),
            settings=wandb.Settings(init_timeout=WANDB_INIT_TIMEOUT_S, console="off", silent=True),
        )
    except (wandb.errors.CommError, wandb.errors.UsageError) as error:
        raise UserError(f"run.wandb is {config.run.wandb}: {error}; offline works: run.wandb=offline") from None


def _for_a_web_page(config: Config) -> dict[str, Any]:
    """The configuration without a user's variables, shell lines and words to Slurm."""
    values = asdict(config)
    del values["run"]["notify"]
    for cluster in (values["cluster"], *(own.get("cluster", {}) for own in values["overrides"].values())):
        for key in NOT_FOR_A_WEB_PAGE:
            cluster.pop(key, None)
    return values


def _wandb_id(path: Path) -> str:
    if path.exists():
        return read_text(path).strip()
    identifier = uuid.uuid4().hex[:12]
    write_text(path, identifier)
    return identifier


def _is_record(line: Mapping[str, Any]) -> bool:
    return isinstance(line.get("iteration"), int)


def _plain(value: float | int | str) -> float | int | str:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: Any) -> float | None:
    if isinstance(value, str):
        return float(value) if value in ("nan", "inf", "-inf") else None
    return value if isinstance(value, int | float) else None
