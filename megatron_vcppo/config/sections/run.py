"""Section ``run``."""

from dataclasses import dataclass
from typing import Annotated, Literal

from omegaconf import MISSING

from megatron_vcppo.config.ranges import PositiveFloat, PositiveInt, Range

Access = Literal["private", "group", "as_is"]


@dataclass
class RunConfig:
    """The run folder, and what applies to every stage."""

    dir: str = MISSING
    """Run folder; every stage writes below it. On a cluster it must be on the shared file system."""
    access: Access = "private"
    """Who may enter the run folder. private: the user alone (mode 0700). group: the folder's group may read, too (mode
    2750; chgrp chooses the group). as_is: the mode that the folder has is kept; a new one is private. The run's
    files have such modes, too (0600, 0640; as_is: by the umask), also once they are moved."""
    seed: Annotated[int, Range("[0, 4294967296)")] = 0
    """Seed of data order, sampling and new heads. Two runs with the same seed and layout give the same numbers."""
    wandb: Literal["online", "offline", "off"] = "off"
    """Also log metrics to Weights & Biases; upload offline runs later with `wandb sync`."""
    wandb_project: str = "megatron_vcppo"
    """Project at Weights & Biases."""
    tensorboard: bool = False
    """Also log metrics for TensorBoard (pip install tensorboard), in RUN/STAGE/tensorboard; `tensorboard --logdir RUN`
    shows them."""
    timeout_s: PositiveFloat = 600.0
    """Deadline in seconds of every collective and of every wait for another process; what takes longer is reported as
    hung. An iteration consists of many of them and may take longer, and so may a save on request (docs/slurm.md)."""
    notify: str | None = None
    """Shell command that is run once the chain is done, a stage has failed, or a job is stuck (requeued without
    progress): VCPPO_EVENT is done, failed or stuck; VCPPO_RUN, VCPPO_STAGE and VCPPO_CAUSE say where and why."""
    skip_limit: PositiveInt = 5
    """Stop the stage (after saving) once this many consecutive updates of one model were skipped for a non-finite loss
    or gradient. Applies to every training stage."""
