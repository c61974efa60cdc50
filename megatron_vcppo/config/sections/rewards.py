"""Section ``rewards``: what verifiers need besides the problems."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_vcppo.config.ranges import NonNegativeFloat, PositiveFloat, PositiveInt

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
class ModelRewardConfig:
    """A neural reward model, next to the verifiers or instead of them, in value pretraining and PPO.

    A response's reward is verifier_weight × the verifier's + weight × the model's. There is a model if path or stage is
    set.
    """

    path: str | None = None
    """Folder of a Hugging Face checkpoint for sequence classification with one label (Qwen2, Qwen2.5, Qwen3, Llama
    3)."""
    stage: Literal["reward_model"] | None = None
    """reward_model: the model that the chain's stage of this name trained."""
    input: Literal["tokens", "chat"] = "tokens"
    """What the model reads. tokens: the tokens of prompt and response, which needs the tokenizer of model.hf. chat: the
    texts of prompt and response as a chat of its own tokenizer and chat template; for a path only."""
    weight: PositiveFloat = 1.0
    """Weight of the model's reward, after normalization and clipping."""
    verifier_weight: NonNegativeFloat = 1.0
    """Weight of the verifier's reward; 0: responses are rewarded by the model alone."""
    normalize: Literal["running", "none"] = "running"
    """running: subtract the mean and divide by the standard deviation of all scores of the stage so far. none: the
    scores as they are."""
    clip: PositiveFloat | None = 5.0
    """Bound the model's reward to [-clip, clip], after normalization; null: unbounded."""


@dataclass
class RewardsConfig:
    """Rewards of responses."""

    model: ModelRewardConfig = field(default_factory=ModelRewardConfig)
    code: CodeRewardConfig = field(default_factory=CodeRewardConfig)
