"""Sections ``rollout`` (vLLM engines and sampling) and ``weight_sync``."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_vcppo.config.ranges import NonNegativeInt, PositiveFloat, PositiveFraction, PositiveInt


@dataclass
class EngineConfig:
    """One vLLM engine, and how many of them a rollout node starts."""

    per_node: PositiveInt = 1
    """Engines per rollout node; each gets tp × dp GPUs."""
    tp: PositiveInt = 1
    """Tensor-parallel size of an engine."""
    dp: PositiveInt = 1
    """Data-parallel replicas inside an engine, behind one HTTP server."""
    dtype: str | None = None
    """Type of parameters and activations. Default: model.dtype."""
    max_num_seqs: PositiveInt = 256
    """Maximum number of responses that an engine generates concurrently."""
    gpu_memory_utilization: PositiveFraction = 0.9
    """Fraction of a GPU's memory for weights and KV cache."""
    cpu_cache_gib: PositiveInt = 1
    """KV cache of each worker in GiB on a machine without GPUs."""
    sleep_level: Literal[1, 2] = 2
    """With cluster.engines_on trainer_gpus: what a sleeping engine does with its weights. 1: keep them in host memory.
    2: discard them; this needs no host memory and no extra time, because weights are pushed after waking anyway."""
    enforce_eager: bool = False
    """Run without captured graphs: slower on GPUs, starts faster. Always on without GPUs."""
    extra_args: list[str] = field(default_factory=list)
    """Additional arguments of vLLM's server, as on its command line."""


@dataclass
class RolloutConfig:
    """Generation of responses by vLLM servers on rollout nodes."""

    engine: EngineConfig = field(default_factory=EngineConfig)
    temperature: PositiveFloat = 1.0
    """Sampling temperature; log-probs are computed at it."""
    max_tokens: PositiveInt = 1024
    """Maximum length of a response in tokens; prompt and response together never exceed model.max_length."""
    stop: list[str] = field(default_factory=list)
    """Strings that end a response, in addition to the model's end token. They slow down generation; prefer the end
    token."""
    num_samples: PositiveInt = 1
    """Responses per prompt."""
    top_p: PositiveFraction = 1.0
    """Nucleus sampling. Keep 1 in training: dropping the tail renormalizes log-probs over the kept tokens."""
    top_k: NonNegativeInt = 0
    """Sample from the k most likely tokens; 0: all. Keep 0 in training, for the same reason as top_p."""
    ignore_eos: bool = False
    """Continue past the end token, so that every training response has max_tokens: for measuring speed."""
    start_timeout_s: PositiveFloat = 600.0
    """An engine that does not answer within this many seconds after its start is killed and restarted."""
    health_timeout_s: PositiveFloat = 30.0
    """An engine that answers no health check for this many seconds is considered hung, killed and restarted."""
    request_timeout_s: PositiveFloat = 1800.0
    """A response that takes longer than this many seconds is withdrawn from its engine and sent to another."""
    all_dead_timeout_s: PositiveFloat = 900.0
    """Generation fails if no engine with current weights answers for this many seconds; must cover a restart and a
    push."""
    turn_timeout_s: PositiveFloat = 43200.0
    """With cluster.engines_on trainer_gpus: maximum time in seconds for which a restarting engine waits for the end of
    the trainer's turn on the GPUs; must be longer than an iteration."""
    max_restarts: NonNegativeInt = 10
    """Restarts of an engine within one attempt of the job; after that the rollout node fails."""


@dataclass
class WeightSyncConfig:
    """The push of the actor's weights to the engines before each iteration's generation."""

    transport: Literal["network", "disk"] = "network"
    """network: broadcast from the trainer's ranks (NCCL on GPUs, gloo on CPU). disk: safetensors in the run folder, for
    clusters whose trainer and rollout nodes share only a file system. With cluster.engines_on trainer_gpus, network
    means the memory of each node (/dev/shm) if its ranks hold a whole replica of the actor, else gloo, because NCCL
    does not support two ranks on one GPU."""
    offload_weights: bool = False
    """With cluster.engines_on trainer_gpus: also keep the weights of actor, critic and reference in host memory while
    engines generate, as is always done with optimizer state and gradients."""
    bucket_mib: PositiveInt = 64
    """Size of the buckets in which weights are sent, in MiB, shared by the pipeline stages; a sending rank and a
    receiving worker hold two of them."""
    max_senders: PositiveInt = 8
    """Trainer ranks that send at the same time at most (one per pipeline stage at least), spread evenly over data- and
    tensor-parallel ranks, and so over nodes and their links. Each sends an equal part, and costs every engine worker a
    communicator; more of them than an engine's node has links gain nothing."""
    verify: bool = False
    """Compare a checksum of every tensor that an engine receives with the trainer's; a push that differs fails with the
    tensor's name."""
    pause: Literal["drain", "keep"] = "drain"
    """drain: engines finish running responses before they load weights. keep: they pause them and continue with the new
    weights."""
    timeout_s: PositiveFloat = 600.0
    """Deadline of a push in seconds, from the pause to the last tensor."""
