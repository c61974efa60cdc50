"""What goes over HTTP between trainer and engines, as typed JSON. No vLLM, no torch: both sides import this."""

import msgspec

GENERATE, STATUS, SYNC = "/vcppo/generate", "/vcppo/status", "/vcppo/sync"
SLEEP, WAKE = "/vcppo/sleep", "/vcppo/wake"

CORE_IS_DEAD = 500
"""HTTP status of the status route when only a restart helps: the core is gone, or went to sleep or woke half-way."""

NO_VERSION = -1
"""The policy version of an engine that still holds the weights it started with, or half of a push."""


PUSHES = "vcppo_pushes"
"""Where an engine's core puts, among vLLM's transfer parameters of a finished response, how many tokens it had at each
push. vLLM's own spans of weight versions are those of outputs, and of a response there is one output only."""


class Sampling(msgspec.Struct, frozen=True):
    """How responses are drawn; the same for every request of a batch."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: list[str] = []
    ignore_eos: bool = False
    routed_experts: bool = False
    """Also send the experts that were chosen for each token."""


class GenerateRequest(msgspec.Struct, frozen=True):
    """One response to draw, or a turn of one. ``key`` comes back with it."""

    key: int
    token_ids: list[int]
    max_tokens: int
    seed: int
    stop: list[str] = []
    """Texts that end it, in addition to those of the batch."""
    num_routed: int = 0
    """Leading tokens whose experts are not sent, because they came with the turn before."""


class GenerateBatch(msgspec.Struct, frozen=True):
    """Body of POST /vcppo/generate; the answer is one line of JSON per request, in the order they finish."""

    sampling: Sampling
    requests: list[GenerateRequest]


class Response(msgspec.Struct, frozen=True):
    """One line of the answer: a response, or what went wrong with it."""

    key: int
    token_ids: list[int] = []
    logprobs: list[float] = []
    finish_reason: str = ""
    policy_version: int = NO_VERSION
    """The version under which the first token was drawn."""
    version_changes: list[tuple[int, int]] = []
    """(token, policy version) from which on later tokens were drawn, where weights were pushed meanwhile."""
    routed_experts: bytes = b""
    """If requested: of each token of prompt and response but the last, from ``num_routed`` on, the experts of each
    layer, 1 byte each, or 2 (little-endian) where a layer has more than 256."""
    error: str = ""


class Status(msgspec.Struct, frozen=True):
    """Answer of GET /vcppo/status, given only if the engine's core answers too."""

    state: str
    """"serving", "syncing" (paused, taking weights), "broken" (a push failed half-way),
    "asleep" (without GPU memory), "waking" (with a part of it) or "turning" (on the way between these)."""
    policy_version: int
    running: int
    """Requests in flight."""
    num_workers: int
    """Worker processes that take part in a push: tensor × pipeline × data parallel."""


WEIGHTS, CACHE = "weights", "kv_cache"
"""The parts of an engine's GPU memory that wake one by one, as vLLM names them."""


class SleepRequest(msgspec.Struct, frozen=True):
    """Body of POST /vcppo/sleep: drop what runs and free the GPU's memory. Answered when that is done."""

    level: int
    """1: weights go to host memory; 2: they are discarded, and must be pushed after waking."""
    timeout_s: float


class WakeRequest(msgspec.Struct, frozen=True):
    """Body of POST /vcppo/wake: take GPU memory again. Parts that are awake stay so."""

    parts: list[str]
    timeout_s: float


class TurnReport(msgspec.Struct, frozen=True):
    """Answer to both."""

    error: str = ""


class GroupAddress(msgspec.Struct, frozen=True, eq=True):
    """Where one sender of a push is met: the store of its process group, and the ranks of this engine in it."""

    address: str
    port: int
    first_rank: int
    world_size: int


class SyncRequest(msgspec.Struct, frozen=True):
    """Body of POST /vcppo/sync: pause, take the new weights, drop stale caches, continue. Answered when all is done."""

    policy_version: int
    pause: str
    """"drain": running requests finish first. "keep": they are frozen and continue under the new weights."""
    timeout_s: float
    backend: str
    """"gloo", "nccl" (over ``streams``) or "disk" (from ``folder``)."""
    streams: list[list[GroupAddress]] = []
    """Of each pipeline stage the groups of its senders, by the index of their stripes."""
    folder: str = ""
    address: str = "127.0.0.1"
    """The engine's own address on the network that the weights take."""


class SyncReport(msgspec.Struct, frozen=True):
    """Answer of POST /vcppo/sync: what it cost, or why it failed."""

    error: str = ""
    lost: bool = False
    """The engine itself did not answer: it is at fault, where others only noticed."""
    pause_s: float = 0.0
    """How long generation stood still."""
