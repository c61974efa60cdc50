"""Where engines run (the key cluster.engines_on), and how many nodes and GPUs they take. No torch."""

from typing import Literal

from megatron_vcppo.config.schema import Config

Placement = Literal["rollout_nodes", "trainer_nodes", "trainer_gpus"]


def engine_placement(config: Config) -> Placement:
    """cluster.engines_on; unless it is set: rollout nodes if there are any, else the trainer's nodes."""
    cluster = config.cluster
    return cluster.engines_on or ("rollout_nodes" if cluster.rollout_nodes else "trainer_nodes")


def engine_nodes(config: Config) -> int:
    """Number of nodes that run engines."""
    cluster = config.cluster
    return cluster.rollout_nodes if engine_placement(config) == "rollout_nodes" else cluster.trainer_nodes


def node_holds_replica(config: Config, num_ranks: int) -> bool:
    """Whether the trainer's ranks of every node hold all weights of the actor between them.

    num_ranks: of the trainer, over all nodes. Megatron puts pipeline stages furthest apart: those of one replica are on
    one node only if all ranks are.
    """
    nodes, parallel = config.cluster.trainer_nodes, config.parallel
    return nodes == 1 or (parallel.pp == 1 and num_ranks // nodes % parallel.tp == 0)


def engine_gpus_per_node(config: Config) -> int:
    """Accelerators that the engines of one node take together."""
    engine = config.rollout.engine
    return engine.per_node * engine.tp * engine.dp
