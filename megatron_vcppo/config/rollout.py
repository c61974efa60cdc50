"""Configuration of generation (vLLM engines and sampling) and of the weight push that keeps them current."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class EngineConfig:
    """One vLLM engine and how many of them a rollout node starts."""

    per_node: int = 1
    """Engines on each rollout node; each gets tp × dp accelerators."""
    tp: int = 1
    """Tensor-parallel workers of an engine."""
    dp: int = 1
    """Data-parallel replicas inside an engine (one HTTP server in front of them)."""
    dtype: str | None = None
    """Parameters and activations; default: model.dtype."""
    max_num_seqs: int = 256
    """Responses that an engine works on at once."""
    gpu_memory_utilization: float = 0.9
    """Share of an accelerator's memory for weights and cache."""
    cpu_cache_gib: int = 1
    """Size of the KV cache of each worker on a machine without accelerators."""
    sleep_level: int = 2
    """With cluster.engines_on trainer_gpus: what a sleeping engine does with its weights. 1: they go to host memory; 2:
    they are discarded, which takes no host memory, and costs nothing more where they are pushed after waking anyway."""
    enforce_eager: bool = False
    """Run without captured graphs: slower on accelerators, starts faster. Always so on CPU."""
    extra_args: list[str] = field(default_factory=list)
    """Further arguments of vLLM's server, as on its command line."""


@dataclass
class RolloutConfig:
    """Generation of responses by vLLM servers on rollout nodes."""

    engine: EngineConfig = field(default_factory=EngineConfig)
    temperature: float = 1.0
    """Sampling temperature; log-probs are taken at it."""
    max_tokens: int = 1024
    """Longest response in tokens; prompt and response together never exceed model.max_length."""
    stop: list[str] = field(default_factory=list)
    """Strings that end a response besides the model's end token. They slow generation; prefer the end token."""
    num_samples: int = 1
    """Responses per prompt."""
    top_p: float = 1.0
    """Keep 1 in training: cutting the tail renormalises the log-probs over the kept tokens."""
    top_k: int = 0
    """Keep 0 in training, for the same reason."""
    ignore_eos: bool = False
    """Continue past the end token, so that every training response has max_tokens: for measuring speed."""
    start_timeout_s: float = 600.0
    """An engine that does not answer this long after its start is killed and started again."""
    health_timeout_s: float = 30.0
    """An engine that does not answer a health check for this long is hung: killed and started again."""
    request_timeout_s: float = 1800.0
    """A response that takes longer is taken from its engine and given to another."""
    all_dead_timeout_s: float = 900.0
    """Generation fails when no engine with current weights answered for this long; covers a restart and a push."""
    turn_timeout_s: float = 43200.0
    """With cluster.engines_on trainer_gpus: an engine that must start again waits this long at most for the trainer's
    turn on the GPUs to end; longer than an iteration."""
    max_restarts: int = 10
    """An engine that died this often in one attempt of the job is given up, and the rollout node with it."""


@dataclass
class WeightSyncConfig:
    """The push of the actor's weights into the engines before each iteration's generation."""

    transport: Literal["network", "disk"] = "network"
    """network: broadcast from the trainer's ranks (NCCL on GPUs, gloo on CPU). disk: safetensors in the run folder,
    for clusters where trainer and rollout nodes share no network but a file system. With cluster.engines_on
    trainer_gpus, network is the memory of each node (/dev/shm) where its ranks hold a whole replica of the actor, else
    gloo: NCCL takes no two ranks on one GPU."""
    offload_weights: bool = False
    """With cluster.engines_on trainer_gpus: the weights of actor, critic and reference are in host memory while engines
    generate, as the optimizer's state and the gradients always are."""
    bucket_mib: int = 64
    """Weights travel in buckets of this size; a sending rank holds two of them."""
    pause: Literal["drain", "keep"] = "drain"
    """drain: engines finish what runs before they take weights. keep: they freeze it and continue under new weights."""
    timeout_s: float = 600.0
    """Deadline of a push, from the pause to the last tensor in place."""
