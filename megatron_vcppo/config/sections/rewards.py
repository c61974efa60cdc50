"""Section ``rewards``: what verifiers need besides the problems."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_vcppo.config.ranges import PositiveInt

Isolation = Literal["auto", "bubblewrap", "namespaces", "landlock", "none"]


@dataclass
class CodeRewardConfig:
    """Programs written by the model, run against tests (task `code`)."""

    isolation: Isolation = "auto"
    """How programs are kept from the node's files, network and processes. auto: the strongest that works on the node;
    if none works, no code is run. none: programs run with the user's rights; only time, memory, files and output are
    limited."""
    memory_mib: PositiveInt = 2048
    """Address space of a program in MiB; exceeding it raises MemoryError in the program."""
    checkers: dict[str, str] = field(default_factory=dict)
    """name: module:function, for problems whose tests name a checker that is not built in. The function gets the input,
    the expected output and the printed output as text and returns whether the printed one is correct."""


@dataclass
class RewardsConfig:
    """Rewards of responses."""

    code: CodeRewardConfig = field(default_factory=CodeRewardConfig)
