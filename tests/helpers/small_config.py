"""A configuration that is sound, and what is wrong with one that is not."""

import pytest

from megatron_vcppo.config import Config
from megatron_vcppo.config.validation import check_config
from megatron_vcppo.errors import UserError


def small_config() -> Config:
    """One SFT stage; no file that it names exists."""
    config = Config()
    config.run.dir, config.model.hf, config.sft.train, config.stages = "runs/x", "models/x", "x.jsonl", ["sft"]
    return config


def error_of(config: Config) -> str:
    """All problems that the rules find."""
    with pytest.raises(UserError) as failure:
        check_config(config)
    return str(failure.value)
