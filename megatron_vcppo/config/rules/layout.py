"""How ranks and engines fit onto nodes and GPUs."""

from collections.abc import Iterator

from megatron_vcppo.config.placement import (
    data_parallel_size,
    engine_gpus_per_node,
    engine_placement,
    trainer_gpus_per_node,
    trainer_ranks,
    uses_engines,
)
from megatron_vcppo.config.schema import Config
from megatron_vcppo.config.sections.cluster import LOCAL
from megatron_vcppo.errors import UserError
from megatron_vcppo.integers import ceil_div


def trainer_layout(config: Config) -> Iterator[str]:
    """The parallel sizes against the trainer's ranks, and these against nodes, GPUs and CPUs."""
    parallel, cluster = config.parallel, config.cluster
    if cluster.gpus_per_node and cluster.trainer_ranks is None and trainer_gpus_per_node(config) < 1:
        return  # reported by engine_gpus
    ranks, nodes = trainer_ranks(config), cluster.trainer_nodes
    try:
        replicas = data_parallel_size(parallel, ranks)
    except UserError as error:
        yield str(error)
    else:
        if parallel.dp and parallel.dp != replicas:
            sizes = f"tp {parallel.tp} × pp {parallel.pp} × cp {parallel.cp} × dp {parallel.dp}"
            needed = ranks // replicas * parallel.dp
            yield (
                f"parallel: {sizes} needs {needed} ranks, the cluster section has {ranks}: set parallel.dp to "
                f"{replicas} or null"
            )
    if ranks % nodes:
        yield f"cluster: {ranks} trainer ranks do not divide over trainer_nodes {nodes}: change one of the two"
        return
    yield from _ranks_per_node(config, ranks // nodes)


def pipeline_ends(config: Config) -> Iterator[str]:
    """Layers of the first and the last pipeline stage are for pipelines."""
    parallel = config.parallel
    for name, layers in (("first", parallel.first_stage_layers), ("last", parallel.last_stage_layers)):
        if layers is not None and parallel.pp == 1:
            yield f"parallel.{name}_stage_layers {layers} needs parallel.pp > 1, got 1: set it to null"


def sequence_layout(config: Config) -> Iterator[str]:
    """What sequence and context parallelism need."""
    parallel = config.parallel
    tokens, least = parallel.tokens_per_microbatch, 2 * parallel.cp * parallel.tp
    if parallel.cp > 1 and tokens < least:
        yield (
            f"parallel.tokens_per_microbatch {tokens} must be at least 2 × cp {parallel.cp} × tp {parallel.tp} = "
            f"{least}, to which sequences are padded"
        )
    if parallel.sequence_parallel and parallel.tp == 1:
        yield "parallel.sequence_parallel needs parallel.tp > 1, got 1: set it to false"


def placement(config: Config) -> Iterator[str]:
    """cluster.engines_on against the nodes and PPO's staleness."""
    if not uses_engines(config):
        return
    cluster, where = config.cluster, engine_placement(config)
    key = f"cluster.engines_on {where}"
    if where == "rollout_nodes" and not cluster.rollout_nodes:
        yield f"{key} needs cluster.rollout_nodes > 0, got 0"
    if where != "rollout_nodes" and cluster.rollout_nodes:
        yield f"{key} leaves the {cluster.rollout_nodes} nodes of cluster.rollout_nodes without engines: set it to 0"
    if where == "trainer_gpus" and "ppo" in config.stages and config.ppo.staleness:
        yield (
            f"{key} cannot be combined with ppo.staleness {config.ppo.staleness}: engines cannot generate while the "
            "trainer has their GPUs; set ppo.staleness=0"
        )


def engine_gpus(config: Config) -> Iterator[str]:
    """The GPUs that engines take against those of a node."""
    cluster, engine = config.cluster, config.rollout.engine
    gpus, taken = cluster.gpus_per_node, engine_gpus_per_node(config)
    if not gpus or not uses_engines(config):
        return
    engines = f"{engine.per_node} engines × tp {engine.tp} × dp {engine.dp}"
    if taken > gpus:
        yield (
            f"rollout.engine: {engines} take {taken} GPUs of a node; cluster.gpus_per_node is {gpus}: lower "
            "rollout.engine.per_node, tp or dp"
        )
    elif engine_placement(config) == "trainer_nodes":
        ranks = ceil_div(cluster.trainer_ranks or 1, cluster.trainer_nodes)
        if ranks + taken > gpus:
            trainer = "1 trainer rank" if ranks == 1 else f"{ranks} trainer ranks"
            yield (
                f"cluster.engines_on trainer_nodes: {trainer} and {engines} = {taken} take {ranks + taken} "
                f"GPUs of a node; cluster.gpus_per_node is {gpus}: use fewer engines, other nodes for them "
                "(cluster.rollout_nodes) or the same GPUs (cluster.engines_on: trainer_gpus)"
            )


def offloaded_weights(config: Config) -> Iterator[str]:
    """weight_sync.offload_weights is for engines on the trainer's GPUs."""
    where = engine_placement(config)
    if config.weight_sync.offload_weights and uses_engines(config) and where != "trainer_gpus":
        yield (
            "weight_sync.offload_weights needs cluster.engines_on trainer_gpus, where engines use the trainer's GPUs; "
            f"got {where}: set it to false"
        )


def _ranks_per_node(config: Config, ranks: int) -> Iterator[str]:
    cluster, tp = config.cluster, config.parallel.tp
    if cluster.gpus_per_node and ranks > cluster.gpus_per_node:
        yield (
            f"{ranks} trainer ranks per node need as many GPUs; cluster.gpus_per_node is {cluster.gpus_per_node}: "
            "lower cluster.trainer_ranks"
        )
    if cluster.trainer_nodes > 1 and tp > ranks:
        yield (
            f"parallel.tp {tp} would span nodes: only {ranks} ranks are on each of {cluster.trainer_nodes} trainer "
            f"nodes: lower it to at most {ranks} (and raise parallel.pp)"
        )
    if cluster.name != LOCAL and not cluster.gpus_per_node and ranks > cluster.cpus_per_node:
        yield (
            f"{ranks} trainer ranks per node need as many CPUs; cluster.cpus_per_node is {cluster.cpus_per_node}: "
            f"raise it to {ranks}"
        )


LAYOUT_RULES = (trainer_layout, pipeline_ends, sequence_layout, placement, engine_gpus, offloaded_weights)
