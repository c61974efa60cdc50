"""Prompts, reward model, value pretraining, PPO, evaluation and export: what the papers leave to be set."""

from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

from megatron_vcppo.config.training import CheckpointConfig, OptimizerConfig, ScheduleConfig


@dataclass
class PromptsConfig:
    """Problems with checkable answers, for value pretraining, PPO and evaluation."""

    train: str = MISSING
    """JSONL or `datasets` source with prompt, answer and task."""
    test: str | None = None
    """Held-out problems for evaluation."""
    prompt_key: str = "prompt"
    """Name of the prompt in the data."""
    answer_key: str = "answer"
    """Name of the answer in the data."""
    task_key: str = "task"
    """Name of the task in the data."""
    task: str | None = None
    """Verifier of problems that name no task themselves."""
    bad_samples: Literal["error", "skip", "truncate"] = "error"
    """What happens to malformed problems, and to prompts that leave no room for a response."""
    verifiers: dict[str, str] = field(default_factory=dict)
    """task: verifier, beside the built-in ones: the name of one of those, or module:function of your own, which is
    given the Prompt and the response's text and returns a Verdict (megatron_vcppo/rewards/verifier.py).
    {math: math_percent} accepts 0.5 where 50% is expected and the other way round."""
    verify_timeout_s: float = 10.0
    """A verifier that takes longer on one answer is stopped; the answer counts as wrong and is reported."""
    verify_workers: int = 2
    """Verifier processes of each data-parallel replica."""


@dataclass
class RewardModelConfig:
    """A scalar head on the SFT model that scores whole responses at their last token: the baseline critic's start."""

    num_prompts: int = 1024
    """Problems whose responses are sampled and verified for training."""
    loss: Literal["bce", "mse", "pairwise"] = "bce"
    """bce: cross-entropy. mse: squared error. pairwise: a right response over a wrong one of the same prompt."""
    label_smoothing: float = 0.0
    """Moves the labels of bce away from 0 and 1, which bounds the scores."""
    cut_share: float = 0.0
    """Share of responses cut at a random token and labelled wrong: how strongly incomplete answers are rejected, and
    with it the initialisation bias of a critic made from this model."""
    steps: int = 100
    """Optimizer steps."""
    batch_size: int = 64
    """Responses per step; with pairwise loss half as many pairs of a right and a wrong one."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-5))
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


@dataclass
class ValuePretrainConfig:
    """The critic learns Monte-Carlo returns (λ = 1) of the fixed SFT policy (VC-PPO, section 3.2)."""

    init: Literal["sft", "reward_model", "random_head", "checkpoint"] = "reward_model"
    """Trunk and head. sft, random_head: the SFT actor's trunk and a new head (random_head: model.hf's trunk);
    reward_model: that stage's trunk and head; checkpoint: value_pretrain.checkpoint_path."""
    checkpoint_path: str | None = None
    """A critic's folder inside a checkpoint (…/iter_0000100/critic)."""
    rollouts: Literal["fresh", "stored"] = "fresh"
    """fresh: every step trains once on new rollouts. stored: one set is generated, kept, and used for all steps."""
    stored_path: str | None = None
    """Folder of a stored set: taken if it is there, else made; default: RUN/value_pretrain/rollouts."""
    stored_rollouts: int = 4096
    """Rollouts in a stored set."""
    steps: int = 100
    """Optimizer steps at most, and exactly as many without a stopping rule."""
    batch_size: int = 512
    """Rollouts per step."""
    stop_when_stable: bool = False
    """Stop before ``steps`` once explained variance and value loss have both changed by less than the tolerance
    between the last window and the one before it."""
    stable_window: int = 10
    """Steps averaged in a window."""
    stable_tolerance: float = 0.02
    """For explained variance absolute, for the value loss relative."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=2e-6))
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


@dataclass
class AdvantageConfig:
    """From rewards and values to advantages and critic targets."""

    gamma: float = 1.0
    """Discount per token."""
    lam_actor: float = 0.95
    """λ of the advantages (VC-PPO recommends 0.95 to below 1)."""
    lam_critic: float = 1.0
    """λ of the critic's targets; 1 is the Monte-Carlo return. Plain PPO has lam_actor here too."""
    length_adaptive_alpha: float | None = None
    """VAPO: λ_actor = 1 - 1 / (α · length), clamped to 0 … 1; 0.05 in the paper."""
    whiten: bool = True
    """Advantages to mean 0 and variance 1 over the batch."""
    baseline: Literal["critic", "grpo", "rloo"] = "critic"
    """grpo and rloo compare the samples of one prompt and train no critic; they need rollout.num_samples over 1."""
    explained_variance_gate: bool = False
    """EVPO: use the batch mean instead of the critic while its explained variance is not above 0."""
    overlong_penalty_tokens: int = 0
    """DAPO's soft punishment: the last N tokens before rollout.max_tokens lower the reward, linearly to -1."""
    overlong_filter: bool = False
    """Leave responses out of the losses that were cut at rollout.max_tokens."""


@dataclass
class PolicyLossConfig:
    """The clipped surrogate and what may be added."""

    clip_low: float = 0.2
    """The ratio is clipped to 1 - clip_low … 1 + clip_high."""
    clip_high: float = 0.2
    """VAPO and DAPO: 0.28."""
    dual_clip: float | None = None
    """Bounds the loss of negative advantages at this many times the advantage; over 1."""
    aggregation: Literal["token", "sequence", "constant_length"] = "token"
    """token: every token counts the same. sequence: every response, as the mean over its tokens. constant_length:
    tokens, divided by responses × rollout.max_tokens."""
    tis_cap: float | None = None
    """Truncated importance sampling between the trainer's and the engines' log-probs, capped here."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    positive_lm_coef: float = 0.0
    """VAPO: weight of the language-model loss on correct responses; 0.1 in the paper."""
    kl_coef: float = 0.0
    """Weight of the KL divergence from the actor that the stage starts from; 0 as in the paper: no reference model."""
    kl_kind: Literal["k1", "k2", "k3"] = "k3"
    """Estimate per token, d being the log-ratio: k1 = d, for rewards only; k2 = d²/2; k3 = exp(-d) - 1 + d."""
    kl_in: Literal["reward", "loss"] = "loss"
    """Whether the KL term lowers each token's reward or is added to the loss."""
    kl_target: float | None = None
    """Adapt kl_coef towards this divergence (nats per token); default: fixed."""
    kl_horizon: float = 10000.0
    """Rollouts over which the adaptive coefficient moves."""


@dataclass
class CriticConfig:
    """How the critic is trained in PPO."""

    init: Literal["value_pretrain", "reward_model", "sft", "random_head", "checkpoint"] = "value_pretrain"
    """The stage whose model the critic starts from, or as in value_pretrain.init."""
    checkpoint_path: str | None = None
    """With init: checkpoint."""
    updates_per_actor_update: int = 1
    """Passes over each minibatch."""
    value_clip: float | None = None
    """Clip the change of each value to this, as PPO's code does; null: no clipping."""
    huber_delta: float | None = None
    """Errors of the critic beyond this count linearly; null: squared error."""
    bounds: list[float] | None = None
    """[low, high]: map values smoothly into the range of rewards; default: unbounded."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=2e-6))
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)


@dataclass
class PpoConfig:
    """PPO with decoupled GAE."""

    iterations: int = 100
    """Rollout batches; each is followed by the updates."""
    prompts_per_iteration: int = 512
    """Different problems per iteration; with rollout.num_samples responses each."""
    minibatches: int = 1
    """Optimizer steps per pass over the batch."""
    ppo_epochs: int = 1
    """Passes over each batch."""
    critic_only_iterations: int = 0
    """First iterations in which only the critic learns."""
    staleness: Literal[0, 1] = 0
    """1: the next batch is generated, by the actor before this update, while this one is trained on."""
    dynamic_sampling: bool = False
    """DAPO: drop prompts whose responses all got the same reward and sample others in their place."""
    dynamic_sampling_rounds: int = 5
    """Rounds of replacement at most; what is then missing is said and trained without."""
    skip_limit: int = 5
    """Updates of one model in a row that are skipped because a loss or gradient was not finite, when the stage stops,
    saved; every stage that trains counts to this number."""
    evaluate_every: int = 0
    """Iterations between evaluations on the live engines; 0: none."""
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    loss: PolicyLossConfig = field(default_factory=PolicyLossConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-6))
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=lambda: CheckpointConfig(save_every=10))


@dataclass
class EvaluateConfig:
    """avg@k and pass@k on prompts.test."""

    num_samples: int = 1
    """Responses per problem: n of the estimators."""
    k: list[int] = field(default_factory=lambda: [1])
    """pass@k is estimated for each; none above num_samples."""
    num_prompts: int | None = None
    """The first N problems; default: all."""
    temperature: float = 1.0
    """Sampling temperature of the evaluation."""
    top_p: float = 1.0
    """Nucleus of the evaluation's sampling; 1: all tokens."""
    checkpoints: dict[str, str] = field(default_factory=dict)
    """name: Hugging Face folder, to be compared; default: what the chain's stages left."""


@dataclass
class ExportConfig:
    """The last actor in Hugging Face format, checked."""

    out: str | None = None
    """Folder; default: RUN/export/hf."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Default: as in model.hf."""
    verify_logits: bool = True
    """Compare the logits of a short prompt with the Megatron model's."""
    critic: bool = False
    """Export the critic too, to RUN/export/critic."""
