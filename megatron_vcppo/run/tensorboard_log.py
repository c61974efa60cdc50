"""The metrics of a stage for TensorBoard (run.tensorboard): event files per stage, continued by a resume."""

import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_vcppo.config import Config
from megatron_vcppo.errors import UserError
from megatron_vcppo.run.folder import StageFolder


def start_tensorboard(folder: Path, config: Config, resume_iteration: int) -> "TensorBoardLog | None":
    """The log of a stage in ``folder``; None if run.tensorboard is off. UserError if the package is missing."""
    if not config.run.tensorboard:
        return None
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError(
            "run.tensorboard is true, but the package is missing: pip install tensorboard, or set run.tensorboard=false"
        )
    return TensorBoardLog(StageFolder(folder).tensorboard, resume_iteration)


class TensorBoardLog:
    """Scalars by iteration; every record is with the operating system when ``log`` returns."""

    def __init__(self, folder: Path, resume_iteration: int) -> None:
        """Continue after ``resume_iteration``: TensorBoard drops what earlier files have beyond it."""
        from torch.utils.tensorboard import SummaryWriter  # a second, and only for those who want it

        self._folder = folder
        self._writer: Any = SummaryWriter(str(folder), purge_step=resume_iteration + 1)

    def log(self, iteration: int, metrics: Mapping[str, float | int | str]) -> None:
        """Write the finite numbers among the metrics. OSError with the folder if that is not possible."""
        try:
            for name, value in metrics.items():
                if isinstance(value, int | float) and math.isfinite(value):
                    self._writer.add_scalar(name, value, iteration)
            self._writer.flush()
        except OSError as error:  # of a thread that writes, which names no file
            error.filename = error.filename or str(self._folder)
            raise

    def close(self) -> None:
        """Finish; safe to call twice."""
        self._writer.close()
