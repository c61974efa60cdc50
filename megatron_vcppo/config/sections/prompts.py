"""Section ``prompts``."""

from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import MISSING

from megatron_vcppo.config.ranges import PositiveFloat, PositiveInt


@dataclass
class PromptsConfig:
    """Problems with checkable answers, for reward model, value pretraining, PPO and evaluation."""

    train: str = MISSING
    """JSONL file or `datasets` source with prompt, answer and task, or problems by name: see docs/tasks.md."""
    test: str | None = None
    """Held-out problems for evaluation, in the same form."""
    mix: dict[str, PositiveFloat] = field(default_factory=dict)
    """More sources of training prompts, {source: weight}: how often each of their prompts comes in an epoch. 2 is
    twice, 0.25 a quarter of the prompts once, each epoch another quarter. prompts.train has weight 1 unless it is named
    here."""
    prompt_key: str = "prompt"
    """Field of the data that holds the prompt: a name, a path such as extra_info.question or 0.value, or several of
    these with | between them, of which the first that has a value counts."""
    answer_key: str = "answer"
    """Field of the data that holds the answer, written in the same way: reward_model.ground_truth."""
    task_key: str = "task"
    """Field of the data that names the task, written in the same way."""
    template: str = "{prompt}"
    """Text around every prompt, which stands for {prompt}; in a chat around the last user message. Used by SFT, too."""
    system: str | None = None
    """System message of chats that have none. Used by SFT, too."""
    apply_chat_template: bool = True
    """Format text prompts as a user's message by the tokenizer's chat template, if it has one; chats always are. Used
    by SFT, too. Runs of versions without this key continue with false."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables for the chat template, such as {enable_thinking: false}. Used by SFT, too."""
    task: str | None = None
    """Verifier of problems that name no task."""
    bad_samples: Literal["error", "skip", "truncate"] = "error"
    """Handling of malformed problems and of prompts that leave no room for a response."""
    verifiers: dict[str, str] = field(default_factory=dict)
    """task: verifier, in addition to the built-in ones: the name of a built-in verifier, or module:function, which gets
    the Prompt and the response's text and returns a Verdict (megatron_vcppo/rewards/verifier.py).
    {math: math_percent} accepts 0.5 where 50% is expected and vice versa."""
    tools: dict[str, str] = field(default_factory=dict)
    """task: tool that the policy can call within its response: the name of a built-in tool, or module:name of your own
    (megatron_vcppo/rewards/tools.py). What it writes is part of the response, and nothing is learned on it. The task
    tool_sum has one."""
    max_tool_calls: PositiveInt = 32
    """Calls of a tool per response; generation does not pause for later ones."""
    verify_timeout_s: PositiveFloat = 10.0
    """Time limit in seconds of a verifier per answer; on a timeout the answer counts as wrong and is reported. Also of
    a tool per call; on a timeout it writes nothing and is reported."""
    verify_workers: PositiveInt = 2
    """Verifier processes per data-parallel replica."""
    verify_memory_mib: PositiveInt = 2048
    """Memory in MiB that a verifier process may allocate on top of what it has when it starts. An answer that needs
    more is wrong, and at most costs its process."""
