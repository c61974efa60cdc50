"""Which part of the chain a command means."""

import pytest

from megatron_vcppo.commands.arguments import chosen_stages
from megatron_vcppo.errors import UserError


def test_chosen_stages() -> None:
    chain = ["sft", "value_pretrain", "ppo", "export"]
    assert chosen_stages(chain, "value_pretrain", "ppo", None) == ["value_pretrain", "ppo"]
    assert chosen_stages(chain, None, None, "ppo") == ["ppo"]
    with pytest.raises(UserError, match="'pp' is not in this configuration's stages: sft"):
        chosen_stages(chain, "pp", None, None)
    with pytest.raises(UserError, match="--from ppo comes after --until sft"):
        chosen_stages(chain, "ppo", "sft", None)
