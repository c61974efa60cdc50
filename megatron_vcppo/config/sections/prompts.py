"""Section ``prompts``."""

from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

from megatron_vcppo.config.ranges import PositiveFloat, PositiveInt


@dataclass
class PromptsConfig:
    """Problems with checkable answers, for reward model, value pretraining, PPO and evaluation."""

    train: str = MISSING
    """JSONL file or `datasets` source with prompt, answer and task, or problems by name: see docs/tasks.md."""
    test: str | None = None
    """Held-out problems for evaluation, in the same form."""
    prompt_key: str = "prompt"
    """Field of the data that holds the prompt."""
    answer_key: str = "answer"
    """Field of the data that holds the answer."""
    task_key: str = "task"
    """Field of the data that names the task."""
    task: str | None = None
    """Verifier of problems that name no task."""
    bad_samples: Literal["error", "skip", "truncate"] = "error"
    """Handling of malformed problems and of prompts that leave no room for a response."""
    verifiers: dict[str, str] = field(default_factory=dict)
    """task: verifier, in addition to the built-in ones: the name of a built-in verifier, or module:function, which gets
    the Prompt and the response's text and returns a Verdict (megatron_vcppo/rewards/verifier.py).
    {math: math_percent} accepts 0.5 where 50% is expected and vice versa."""
    verify_timeout_s: PositiveFloat = 10.0
    """Time limit in seconds of a verifier per answer; on a timeout the answer counts as wrong and is reported."""
    verify_workers: PositiveInt = 2
    """Verifier processes per data-parallel replica."""
