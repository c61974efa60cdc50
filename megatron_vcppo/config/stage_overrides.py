"""``overrides``: a stage's own parallel layout and nodes, in place of those of the chain."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_vcppo.config.keys import all_keys, nearest_key
from megatron_vcppo.config.placement import engine_placement, on_fewest_nodes, trainer_ranks
from megatron_vcppo.config.ranges import out_of_range
from megatron_vcppo.config.schema import Config, Stage
from megatron_vcppo.config.sections.cluster import ClusterConfig
from megatron_vcppo.config.sections.model import ParallelConfig

OF_THE_RUN = frozenset(
    {
        "name",
        "time_limit_minutes",
        "stage_time_limit_minutes",
        "save_margin_s",
        "setup",
        "python",
        "environment",
        "network_interface",
        "node_cache",
        "container_image",
        "container_python",
        "container_mounts",
        "container_runtime",
        "rollout_restarts",
        "crash_retries",
        "stop_grace_s",
    }
)
"""Keys of the section cluster that all stages of a run share."""
SIZE_OF_A_TRAINER = frozenset({"trainer_nodes", "trainer_ranks", "dp"})
"""Keys by which the overrides of an evaluation say how many ranks push its weights."""


def stage_config(config: Config, stage: str) -> Config:
    """The configuration as the stage reads it, with its overrides in their sections; these have no problems.

    Where engines share the trainer's nodes, a stage that has overrides and generates nothing uses all of their GPUs.
    An evaluation with engines on nodes of their own only pushes weights to them: unless its overrides say how many, it
    takes the fewest trainer nodes that hold a replica.
    """
    given = config.overrides.get(stage)
    own = _overridden(config, stage, given) if given else config
    if stage != "evaluate" or engine_placement(own) != "rollout_nodes":
        return own
    if SIZE_OF_A_TRAINER.isdisjoint(name for section in (given or {}).values() for name in section):
        own = on_fewest_nodes(own)
    nodes = own.cluster.trainer_nodes  # named, so that this configuration stays as it is when it is read again
    return replace(own, overrides={stage: {"cluster": {"trainer_nodes": nodes}}})


def _overridden(config: Config, stage: str, given: Mapping[str, Any]) -> Config:
    own = replace(
        config,
        parallel=_merged(config.parallel, given.get("parallel", {})),
        cluster=_merged(config.cluster, given.get("cluster", {})),
        overrides={},
    )
    ranks = trainer_ranks(replace(own, stages=[cast(Stage, stage)]))
    return replace(own, cluster=replace(own.cluster, trainer_ranks=ranks)) if own.cluster.gpus_per_node else own


def _merged(section: Any, given: Mapping[str, Any]) -> Any:
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(section), dict(given)))


def overridden_stages(config: Config) -> Iterator[tuple[str, Config]]:
    """Each stage of the chain that has overrides, with its configuration as if it were the whole chain."""
    for stage in config.stages:
        if config.overrides.get(stage):
            yield stage, replace(stage_config(config, stage), stages=[stage])


def override_problems(config: Config) -> Iterator[tuple[str, str]]:
    """(dotted key, what is wrong with it): unknown names, wrong types, values out of range."""
    known = all_keys()["stages"].choices_of_items
    for stage, sections in config.overrides.items():
        where = f"overrides.{stage}"
        if stage not in known:
            yield where, f"{where}: no such stage; stages are {', '.join(known)}"
        elif not isinstance(sections, Mapping):
            yield where, f"{where} is a section with parallel and cluster, got {sections!r}"
        else:
            for section, values in sections.items():
                yield from _problems_of_section(where, section, values)


def _problems_of_section(where: str, section: str, values: Any) -> Iterator[tuple[str, str]]:
    cls = {"parallel": ParallelConfig, "cluster": ClusterConfig}.get(section)
    where = f"{where}.{section}"
    if cls is None:
        yield where, f"{where}: only parallel and cluster have values for one stage"
    elif not isinstance(values, Mapping):
        yield where, f"{where} is a section with keys, got {values!r}"
    else:
        for name, value in values.items():
            key, written = f"{section}.{name}", f"{where}.{name}"
            if key not in all_keys():
                near = nearest_key(key)
                yield written, f"{written}: unknown key{f'; did you mean {near}?' if near else ''}"
            elif section == "cluster" and name in OF_THE_RUN:
                yield written, f"{written}: all stages of a run share {key}: set it there"
            else:
                yield from _problems_of_value(cls, key, name, written, value)


def _problems_of_value(cls: type, key: str, name: str, written: str, value: Any) -> Iterator[tuple[str, str]]:
    try:
        OmegaConf.update(OmegaConf.structured(cls), name, value)
    except OmegaConfBaseException:
        yield written, f"{written} must be {all_keys()[key].type_text}, got {value!r}"
        return
    for _, allowed, found in out_of_range(key, all_keys()[key].annotation, value):
        yield written, f"{written} must be in {allowed.text}, got {found}"
