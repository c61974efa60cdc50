"""What is refused before a job is queued."""

from pathlib import Path

import pytest

from megatron_vcppo.errors import UserError
from megatron_vcppo.launch.checks import check_inputs
from tools.benchmarks._tiny_chains import tiny_config


def test_inputs_are_checked_before_anything_is_queued(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run")
    assert check_inputs(config, ["sft"])["sft"] > 3
    config.sft.train = "/no/such/file.jsonl"
    with pytest.raises(UserError, match=r"sft\.train: /no/such/file\.jsonl does not exist"):
        check_inputs(config, ["sft"])
    config.sft.train, config.parallel.tp = __file__, 3
    with pytest.raises(UserError, match="attention heads 4 is not divisible by tp 3"):
        check_inputs(config, ["sft"])
    config.model.hf = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match="nowhere"):
        check_inputs(config, ["sft"])
