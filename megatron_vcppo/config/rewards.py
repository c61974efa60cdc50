"""How answers are judged: what verifiers need beyond the prompts themselves."""

from dataclasses import dataclass, field
from typing import Literal

Isolation = Literal["auto", "bubblewrap", "namespaces", "landlock", "none"]


@dataclass
class CodeRewardConfig:
    """Programs that the model wrote, run against tests (task `code`)."""

    isolation: Isolation = "auto"
    """What keeps programs from the node's files, network and processes. auto: the strongest that works on the node;
    where none works, code is not run. none: programs run with the user's rights; only time, memory, files and output
    are limited."""
    memory_mib: int = 2048
    """Address space of a program; what goes over it gets a MemoryError."""
    checkers: dict[str, str] = field(default_factory=dict)
    """name: module:function, for problems whose tests name a checker that is not built in. It is given the input, the
    expected and the printed output as text and returns whether that is right."""


@dataclass
class RewardsConfig:
    """Rewards of responses."""

    code: CodeRewardConfig = field(default_factory=CodeRewardConfig)
