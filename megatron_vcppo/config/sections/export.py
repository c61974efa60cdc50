"""Section ``export``."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class ExportConfig:
    """The last actor in Hugging Face format, verified."""

    out: str | None = None
    """Output folder. Default: RUN/export/hf."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the exported weights. Default: as in model.hf."""
    verify_logits: bool = True
    """Compare the logits of a short prompt with those of the Megatron model."""
    critic: bool = False
    """Also export the critic, to RUN/export/critic."""
