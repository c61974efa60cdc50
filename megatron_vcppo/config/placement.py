"""Where engines run (the key cluster.engines_on), and how many nodes and GPUs they and the trainer take. No torch."""

from collections.abc import Iterator
from typing import Literal

from megatron_vcppo.config.schema import Config
from megatron_vcppo.integers import ceil_div

Placement = Literal["rollout_nodes", "trainer_nodes", "trainer_gpus"]

ENGINE_STAGES = ("reward_model", "value_pretrain", "ppo", "evaluate")
"""Stages that generate."""


def engine_placement(config: Config) -> Placement:
    """cluster.engines_on; unless it is set: rollout nodes if there are any, else the trainer's nodes."""
    cluster = config.cluster
    return cluster.engines_on or ("rollout_nodes" if cluster.rollout_nodes else "trainer_nodes")


def uses_engines(config: Config) -> bool:
    """True if a stage of the chain generates."""
    return not set(ENGINE_STAGES).isdisjoint(config.stages)


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


def trainer_gpus_per_node(config: Config) -> int:
    """GPUs of each trainer node that are the trainer's: without those that engines have for themselves.

    The same in every stage of the chain, because all of them have one parallel layout. 0 without GPUs; less than 1 if
    the engines leave none.
    """
    gpus = config.cluster.gpus_per_node
    shared = gpus and engine_placement(config) == "trainer_nodes" and uses_engines(config)
    return gpus - engine_gpus_per_node(config) if shared else gpus


def check_placement(config: Config) -> Iterator[str]:
    """One line per reason why engines and ranks cannot be placed as configured."""
    if not uses_engines(config):
        return
    cluster, engine, placement = config.cluster, config.rollout.engine, engine_placement(config)
    where = f"cluster.engines_on {placement}"
    if placement == "rollout_nodes" and not cluster.rollout_nodes:
        yield f"{where} needs cluster.rollout_nodes over 0, got 0"
    if placement != "rollout_nodes" and cluster.rollout_nodes:
        yield f"{where} leaves the {cluster.rollout_nodes} nodes of cluster.rollout_nodes without engines: set it to 0"
    if placement == "trainer_gpus" and "ppo" in config.stages and config.ppo.staleness:
        yield (
            f"{where} does not go with ppo.staleness {config.ppo.staleness}: engines cannot generate while the trainer "
            "has their GPUs"
        )
    yield from _check_gpus(config, f"{engine.per_node} engines × tp {engine.tp} × dp {engine.dp}")


def _check_gpus(config: Config, engines: str) -> Iterator[str]:
    cluster, taken = config.cluster, engine_gpus_per_node(config)
    gpus = cluster.gpus_per_node
    if not gpus:
        return
    if taken > gpus:
        yield f"rollout.engine: {engines} take {taken} GPUs of a node; cluster.gpus_per_node is {gpus}"
    elif engine_placement(config) == "trainer_nodes":
        ranks = ceil_div(cluster.trainer_ranks or 1, max(1, cluster.trainer_nodes))
        if ranks + taken > gpus:
            trainer = "1 trainer rank" if ranks == 1 else f"{ranks} trainer ranks"
            yield (
                f"cluster.engines_on trainer_nodes: {trainer} and {engines} = {taken} take {ranks + taken} "
                f"GPUs of a node; cluster.gpus_per_node is {gpus}: fewer engines, other nodes for them "
                "(cluster.rollout_nodes) or the same GPUs (cluster.engines_on: trainer_gpus)"
            )
