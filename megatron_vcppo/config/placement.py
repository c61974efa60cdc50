"""How many ranks the trainer has, and which nodes and GPUs trainer and engines take. No torch."""

import math
from contextlib import suppress
from dataclasses import replace
from typing import Literal

from megatron_vcppo.config.schema import Config
from megatron_vcppo.config.sections.model import ParallelConfig
from megatron_vcppo.errors import UserError

Placement = Literal["rollout_nodes", "trainer_nodes", "trainer_gpus"]

ENGINE_STAGES = ("reward_model", "value_pretrain", "ppo", "evaluate")
"""Stages that generate."""


def trainer_ranks(config: Config) -> int:
    """Ranks of the trainer over all its nodes."""
    cluster, parallel = config.cluster, config.parallel
    if cluster.trainer_ranks is None and cluster.gpus_per_node:
        return cluster.trainer_nodes * max(1, trainer_gpus_per_node(config))
    return cluster.trainer_ranks or parallel.tp * parallel.pp * parallel.cp * (parallel.dp or 1)


def data_parallel_size(parallel: ParallelConfig, num_ranks: int) -> int:
    """Replicas of the model on this number of ranks. UserError if tp × pp × cp, or ep × pp, does not divide it."""
    model_ranks = parallel.tp * parallel.pp * parallel.cp
    if num_ranks % model_ranks:
        raise UserError(
            f"parallel: tp {parallel.tp} × pp {parallel.pp} × cp {parallel.cp} = {model_ranks} must divide {num_ranks} "
            "trainer ranks: change these sizes, or the number of ranks (cluster.trainer_nodes, cluster.trainer_ranks)"
        )
    per_stage = num_ranks // parallel.pp
    if per_stage % parallel.ep:
        raise UserError(
            f"parallel.ep {parallel.ep} must divide the {per_stage} ranks of a pipeline stage (tp {parallel.tp} × cp "
            f"{parallel.cp} × dp {num_ranks // model_ranks}): change these sizes, or the number of ranks"
        )
    return num_ranks // model_ranks


def on_fewest_nodes(config: Config) -> Config:
    """The configuration on the fewest trainer nodes that hold whole replicas, with as many ranks on each as before.

    Only the number of replicas changes. A layout that does not divide the ranks stays as it is, to be reported.
    """
    cluster, parallel = config.cluster, config.parallel
    ranks_per_node, rest = divmod(trainer_ranks(config), cluster.trainer_nodes)
    for nodes in range(1, 1 if rest else cluster.trainer_nodes + 1):
        with suppress(UserError):
            replicas = data_parallel_size(parallel, nodes * ranks_per_node)
            return replace(
                config,
                parallel=replace(parallel, dp=parallel.dp and replicas),
                cluster=replace(cluster, trainer_nodes=nodes, trainer_ranks=nodes * ranks_per_node),
            )
    return config


def engine_placement(config: Config) -> Placement:
    """cluster.engines_on. Default: rollout nodes if there are any, else the trainer's nodes."""
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
    """Whether the trainer's ranks of every node together hold all weights of the actor.

    num_ranks: of the trainer, over all nodes. Megatron places pipeline stages furthest apart: those of one replica are
    on one node only if all ranks are.
    """
    nodes, parallel = config.cluster.trainer_nodes, config.parallel
    return nodes == 1 or (parallel.pp == 1 and num_ranks // nodes % gather_size(parallel.tp, parallel.ep) == 0)


def gather_size(tp: int, ep: int) -> int:
    """Neighboring ranks of a pipeline stage that together make its weights whole: tensor- and expert-parallel groups
    lie inside such blocks."""
    return math.lcm(tp, ep)


def senders_per_stage(num_ranks: int, pp_size: int, max_senders: int) -> int:
    """How many of the num_ranks trainer ranks of each pipeline stage send weights (weight_sync.max_senders)."""
    return min(num_ranks, max(1, max_senders // pp_size))


def engine_gpus_per_node(config: Config) -> int:
    """GPUs that the engines of one node take together."""
    engine = config.rollout.engine
    return engine.per_node * engine.tp * engine.dp


def trainer_gpus_per_node(config: Config) -> int:
    """GPUs of each trainer node that the trainer uses: all but those that only engines use.

    The same in every stage of the chain, because all of them have one parallel layout. 0 without GPUs; less than 1 if
    the engines leave none.
    """
    gpus = config.cluster.gpus_per_node
    shared = gpus and engine_placement(config) == "trainer_nodes" and uses_engines(config)
    return gpus - engine_gpus_per_node(config) if shared else gpus
