"""Section ``ppo``."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from megatron_vcppo.config.ranges import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Range
from megatron_vcppo.config.sections.training import CheckpointConfig, OptimizerConfig, ScheduleConfig


@dataclass
class AdvantageConfig:
    """From returns and values to advantages and critic targets."""

    lam_actor: Fraction = 0.95
    """λ of the advantages (VC-PPO recommends 0.95 or more, below 1)."""
    lam_critic: Fraction = 1.0
    """λ of the critic's targets; 1: the Monte-Carlo return. Plain PPO uses lam_actor here too."""
    length_adaptive_alpha: PositiveFloat | None = None
    """VAPO: λ_actor = 1 - 1 / (α · length), clamped to [0, 1]; 0.05 in the paper. Default: lam_actor for all
    lengths."""
    whiten: bool = True
    """Scale advantages to mean 0 and variance 1 over the batch."""
    baseline: Literal["critic", "grpo", "rloo"] = "critic"
    """grpo, rloo: compare the responses to one prompt and train no critic; needs rollout.num_samples > 1."""
    explained_variance_gate: bool = False
    """EVPO: use the batch mean instead of the critic while its explained variance is not positive."""


@dataclass
class PolicyLossConfig:
    """The surrogate and optional additional terms."""

    kind: Literal["clip", "dis"] = "clip"
    """clip: PPO's clipped surrogate; the ratio is to the actor before the update, whose log-probs take a pass. dis:
    double-sided importance sampling (SAO): the ratio is to the engines' log-probs, without that pass, and tokens whose
    ratio leaves the range are left out of the loss."""
    clip_low: PositiveFloat = 0.2
    """The range of the ratio is [1 - clip_low, 1 + clip_high]; with dis, ports of SAO use 0.8 and 3."""
    clip_high: PositiveFloat = 0.2
    """See clip_low; 0.28 in VAPO and DAPO."""
    dual_clip: Annotated[float, Range("(1, inf)")] | None = None
    """Bound the loss of a negative advantage A at dual_clip × |A|; null: unbounded."""
    aggregation: Literal["token", "sequence", "constant_length"] = "token"
    """token: mean over all tokens. sequence: mean over responses of the mean over their tokens. constant_length: sum
    over tokens / (responses × rollout.max_tokens)."""
    tis_cap: PositiveFloat | None = None
    """Truncated importance sampling between the trainer's and the engines' log-probs: cap of the ratio; null: off."""
    max_logprob_error: PositiveFloat | None = None
    """Drop a response from the policy loss if its log-probs differ between trainer and engines by more than this (mean
    of |difference| over its tokens, nats); the denominator still counts it. null: none is dropped."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""
    positive_lm_coef: NonNegativeFloat = 0.0
    """VAPO: weight of the language-model loss on correct responses; 0.1 in the paper."""
    kl_coef: NonNegativeFloat = 0.0
    """Weight of the KL divergence from the stage's initial actor; 0, as in the paper: no reference model."""
    kl_kind: Literal["k1", "k2", "k3"] = "k3"
    """Estimator per token, with log-ratio d: k1 = d, for rewards only; k2 = d²/2; k3 = exp(-d) - 1 + d."""
    kl_in: Literal["reward", "loss"] = "loss"
    """Subtract the KL term from each token's reward, or add it to the loss."""
    kl_target: PositiveFloat | None = None
    """Adapt kl_coef toward this divergence (nats per token). Default: kl_coef is fixed."""
    kl_horizon: PositiveFloat = 10000.0
    """With kl_target: number of rollouts over which the coefficient adapts."""


@dataclass
class CriticConfig:
    """How the critic is trained in PPO."""

    init: Literal["value_pretrain", "reward_model", "sft", "random_head", "checkpoint"] = "value_pretrain"
    """The stage whose model initializes the critic; random_head and checkpoint as in value_pretrain.init."""
    checkpoint_path: str | None = None
    """Folder of a critic inside a checkpoint (…/iter_0000100/critic), or a checkpoint of Megatron-LM (torch_dist) of a
    language model, whose trunk gets a new head; required by init checkpoint."""
    moments: Literal["keep", "reset"] = "keep"
    """Adam's moments of a critic from value_pretrain or checkpoint, when PPO starts. keep: those of its pretraining.
    reset: zero, with the bias correction of a first step. Its learning-rate schedule is new in either case."""
    updates_per_actor_update: PositiveInt = 1
    """Optimizer steps of the critic on each minibatch; 2 in SAO."""
    frozen: list[str] = field(default_factory=list)
    """Shell patterns of parameters that stay as they are, over Hugging Face names: ["*.self_attn.*"] freezes attention,
    as SAO does. They have no gradients and no optimizer state. The value head is always trained."""
    value_clip: PositiveFloat | None = None
    """Clip the change of each value to this, as PPO's code does; null: no clipping."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=2e-6))
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)


@dataclass
class PpoConfig:
    """PPO with decoupled GAE."""

    iterations: PositiveInt = 100
    """Number of iterations: a batch of rollouts and the updates on it."""
    prompts_per_iteration: PositiveInt = 512
    """Prompts per iteration, each with rollout.num_samples responses."""
    minibatches: PositiveInt = 1
    """Optimizer steps per pass over the batch."""
    ppo_epochs: PositiveInt = 1
    """Passes over each batch."""
    critic_only_iterations: NonNegativeInt = 0
    """Number of initial iterations in which only the critic is updated."""
    staleness: NonNegativeInt = 0
    """For how many iterations ahead engines generate while the trainer trains; 0: they take turns. A response begun
    with the weights from before iteration i is trained on in iteration i + staleness at the latest, which waits for
    it."""
    partial_rollouts: bool = False
    """With staleness: no iteration waits for a response that is due; it continues under newer weights and comes when it
    is finished. Needs weight_sync.pause keep."""
    window_tokens: PositiveInt | None = None
    """T-PPO: tokens that each response is given per iteration. What is not finished then is trained on as far as it is,
    and continued in the next iteration; the critic learns from finished responses. null, or
    rollout.max_tokens and more: whole responses."""
    dynamic_sampling: bool = False
    """DAPO: drop prompts whose responses all got the same reward and sample other prompts in their place."""
    dynamic_sampling_rounds: PositiveInt = 5
    """Maximum number of resampling rounds. If prompts are still missing, a warning is printed and the iteration trains
    on fewer."""
    routing_replay: bool = False
    """Mixtures of experts: in its log-prob passes and updates the actor sends each token through the experts that the
    engine chose for it, with its own router's weights for them. What the engines send, leaders store and replicas hold
    grows by layers × experts per token bytes per token (twice that above 256 experts)."""
    evaluate_every: NonNegativeInt = 0
    """Iterations between evaluations on the live engines; 0: none."""
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    loss: PolicyLossConfig = field(default_factory=PolicyLossConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-6))
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=lambda: CheckpointConfig(save_every=10))
