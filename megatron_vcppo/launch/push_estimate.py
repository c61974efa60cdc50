"""How long a push will take, from the links on its way. Pure."""

from dataclasses import dataclass

from megatron_vcppo.config import Config
from megatron_vcppo.config.placement import engine_nodes, senders_per_stage, trainer_ranks
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.launch.memory_plan import WEIGHT_BYTES

LINK_SHARE = 0.8
"""What a push reaches of the links on its way (`tools/bench.py weight_sync --link-gbit`, docs/rollouts.md)."""
NIC_GB_PER_S = 50.0
"""400 Gbit/s: taken for every GPU where cluster.link_gb_per_s is not set."""


@dataclass(frozen=True)
class PushEstimate:
    """One push; its time is that of the slowest part, because all parts overlap."""

    gb: float
    """Weights in GB; every engine worker receives all of them."""
    senders: int
    node_gb_per_s: float
    """All links of one node."""
    parts_s: dict[str, float]
    """Seconds of each part on its own."""

    @property
    def seconds(self) -> float:
        """Of the push."""
        return max(self.parts_s.values())

    def __str__(self) -> str:
        """How it was computed."""
        parts = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in self.parts_s.items())
        return (
            f"{self.gb:.1f} GB by {self.senders} senders, {self.node_gb_per_s:g} GB/s of links per node, "
            f"{LINK_SHARE:.0%} of them reached: {self.seconds:.2f} s, the longest of {parts}"
        )


def estimate_push(arch: Architecture, config: Config) -> PushEstimate:
    """Every GPU has an equal part of its node's links. A node receives the weights once per link that senders reach,
    and its workers pass them on over NVLink; a trainer's tensor-parallel ranks gather over NVLink, too, and so do its
    expert-parallel ranks unless they are on several nodes."""
    cluster, parallel, hardware = config.cluster, config.parallel, config.hardware
    per_node = max(1, cluster.gpus_per_node)
    node = cluster.link_gb_per_s or NIC_GB_PER_S * per_node
    gb = arch.parameter_count() * WEIGHT_BYTES[config.model.dtype] / 1e9
    experts_gb = arch.expert_parameter_count() * WEIGHT_BYTES[config.model.dtype] / 1e9
    ranks_per_stage = trainer_ranks(config) // parallel.pp
    senders = parallel.pp * senders_per_stage(ranks_per_stage, parallel.pp, config.weight_sync.max_senders)
    workers = engine_nodes(config) * per_node
    parts = {
        "senders' links": gb / (senders * node / per_node) / LINK_SHARE,
        "links into a rollout node": gb / (min(senders, per_node) * node / per_node) / LINK_SHARE,
        "gather over tp": (gb - experts_gb) / parallel.pp * (1 - 1 / parallel.tp) / hardware.nvlink_gb_per_s,
        "passing on within a node": (gb / hardware.nvlink_gb_per_s / LINK_SHARE) if workers > 1 else 0.0,
        "loading": 2 * gb / hardware.memory_gb_per_s / hardware.memory_share,
    }
    if experts_gb:
        inside_node = parallel.ep <= trainer_ranks(config) // cluster.trainer_nodes
        link = hardware.nvlink_gb_per_s if inside_node else node / per_node * LINK_SHARE
        parts["gather over ep"] = experts_gb / parallel.pp * (1 - 1 / parallel.ep) / link
    return PushEstimate(gb, senders, node, parts)
