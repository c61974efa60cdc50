"""The metrics log of a stage: metrics.jsonl, one JSON object per iteration, and Weights & Biases if asked.

One rank logs; the caller decides which. After a resume the log goes on as if nothing had happened: what was logged
beyond the resumed checkpoint is dropped, because it will be logged again.
"""

import json
import math
import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_vcppo.config import Config
from megatron_vcppo.errors import UserError

FILE_NAME = "metrics.jsonl"
LONGEST_PIECE = "stopping/longest_piece_s"
"""The longest time between two points at which a stage could stop on request, since the record before."""
SAVE_TIME = "stopping/save_s"
"""How long the newest complete checkpoint took, until its files were written and checked."""
WANDB_ID_NAME = "wandb_run_id"
WANDB_INIT_TIMEOUT_S = 60.0


class MetricsLog:
    """Append-only ``folder/metrics.jsonl``; every line is on its way to disk when ``log`` returns."""

    def __init__(
        self, folder: Path, config: Config, stage: str, resume_iteration: int = 0, total_iterations: int | None = None
    ) -> None:
        """Open the log of a stage, cut back to ``resume_iteration``.

        ``total_iterations`` is repeated in every record, for those who show how far the stage is.
        Raises UserError if run.wandb is online and Weights & Biases cannot be reached or has no key.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.total_iterations = total_iterations
        cut_back(folder / FILE_NAME, resume_iteration)
        self._wandb = start_wandb(folder, config, stage)
        self._file = open(folder / FILE_NAME, "a", encoding="utf-8")  # noqa: SIM115

    def log(self, iteration: int, metrics: Mapping[str, float | int | str]) -> None:
        """Write one record; iterations must not go backwards. NaN and infinities are written as words."""
        record: dict[str, Any] = {"iteration": iteration, "timestamp": round(time.time(), 3)}
        if self.total_iterations is not None:
            record["total_iterations"] = self.total_iterations
        record |= {name: _plain(value) for name, value in metrics.items()}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        if self._wandb is not None:
            self._wandb.log(dict(metrics), step=iteration)

    def close(self, exit_code: int = 0) -> None:
        """Finish; safe to call twice."""
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=exit_code)
            self._wandb = None

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(exit_code=0 if kind is None else 1)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The complete records of a stage's log, oldest first; empty if there is none. A torn last line is left out."""
    return read_records(folder / FILE_NAME)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The complete records of a file of one JSON object with an iteration per line; empty if there is none."""
    return [record for _, record in _records(path) if record is not None]


def read_history(folder: Path) -> list[dict[str, float]]:
    """The records of a stage's log as numbers: NaN and infinities are numbers again, what is text is left out."""
    return [
        {name: number for name, value in record.items() if (number := _number(value)) is not None}
        for record in read_metrics(folder)
    ]


def cut_back(path: Path, iteration: int) -> None:
    """Drop the records after ``iteration`` and lines that are none, such as one torn by a kill; says how many."""
    lines = list(_records(path))
    kept = [line for line, record in lines if record is not None and record["iteration"] <= iteration]
    num_dropped = len(lines) - len(kept)
    if not num_dropped:
        return
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(b"".join(kept))
    os.replace(temporary, path)
    print(f"{path}: dropped {num_dropped} of {len(lines)} lines, resuming at iteration {iteration}", flush=True)


def start_wandb(folder: Path, config: Config, stage: str) -> Any:
    """A run of Weights & Biases, the same one after a resume; None if run.wandb is off."""
    if config.run.wandb == "off":
        return None
    import wandb

    if config.run.wandb == "online" and not wandb.api.api_key:
        raise UserError("run.wandb is online, but there is no API key: `wandb login`, or set run.wandb=offline")
    logged = asdict(config)
    logged["cluster"].pop("environment", None)  # a user's variables are not for a web page
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
            config=logged,
            settings=wandb.Settings(init_timeout=WANDB_INIT_TIMEOUT_S, console="off", silent=True),
        )
    except (wandb.errors.CommError, wandb.errors.UsageError) as error:
        raise UserError(f"run.wandb is {config.run.wandb}: {error}; offline works: run.wandb=offline") from None


def _wandb_id(path: Path) -> str:
    if path.exists():
        return path.read_text(encoding="utf-8").strip()
    identifier = uuid.uuid4().hex[:12]
    temporary = path.with_suffix(".tmp")
    temporary.write_text(identifier, encoding="utf-8")
    os.replace(temporary, path)
    return identifier


def _records(path: Path) -> list[tuple[bytes, dict[str, Any] | None]]:
    """Every line with its record; None for a line that is not one."""
    if not path.exists():
        return []
    return [(line, _record(line)) for line in path.read_bytes().splitlines(keepends=True)]


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    complete = line.endswith(b"\n") and isinstance(record, dict) and isinstance(record.get("iteration"), int)
    return record if complete else None


def _plain(value: float | int | str) -> float | int | str:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: Any) -> float | None:
    if isinstance(value, str):
        return float(value) if value in ("nan", "inf", "-inf") else None
    return value if isinstance(value, int | float) else None
