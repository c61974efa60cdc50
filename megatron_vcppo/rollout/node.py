"""``python -m megatron_vcppo.rollout.node --config FILE --rendezvous DIR --node N``: the engines of one node.

Started by the job's controller on each rollout node. TERM or INT ends all engines within seconds; if this process is
killed outright, the kernel kills them.
"""

import argparse
import os
import signal
import sys
import threading
from functools import partial
from itertools import takewhile
from pathlib import Path

from megatron_vcppo.config import Config
from megatron_vcppo.config.load import load_stored_config
from megatron_vcppo.config.network import node_environment, node_network
from megatron_vcppo.config.placement import engine_gpus_per_node, engine_placement
from megatron_vcppo.config.stage_overrides import stage_config
from megatron_vcppo.errors import USER_ERROR, UserError
from megatron_vcppo.rollout import engine_command
from megatron_vcppo.rollout.node_folder import NodeFolder, check_message_room, remove_stale
from megatron_vcppo.rollout.rendezvous import SECRET
from megatron_vcppo.rollout.supervisor import Limits, Slot, run
from megatron_vcppo.run import log
from megatron_vcppo.run.access import follow
from megatron_vcppo.run.files import read_json
from megatron_vcppo.run.processes import has_gpu_driver
from megatron_vcppo.run.secret import make_secret

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


def main() -> int:
    """Run until told to stop; returns the exit code, FAILED if an engine was given up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, type=Path)
    parser.add_argument("--rendezvous", required=True, type=Path, help="folder where engines are published")
    parser.add_argument("--node", required=True, type=int, help="index of this rollout node, from 0")
    parser.add_argument("--stage", default="", help="the stage that these engines work for, whose overrides count")
    args = parser.parse_args()
    log.configure("rollout", args.node)
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    try:
        config = stage_config(load_stored_config(args.config, complete=False), args.stage)  # checked when the run began
        follow(config.run.access)
        os.environ.update(node_environment(config.cluster))
        shared = None
        if engine_placement(config) == "trainer_gpus":
            remove_stale()
            shared = NodeFolder(args.rendezvous, args.node)
        returns_experts = args.stage == "ppo" and config.ppo.routing_replay
        slots = plan_slots(config, Path(config.model.hf), args.rendezvous, args.node, shared, returns_experts)
    except UserError as error:
        log.say(f"error: {error}")
        return USER_ERROR
    return run(slots, stopping, shared)


def plan_slots(
    config: Config,
    model: Path,
    folder: Path,
    node: int,
    shared: NodeFolder | None = None,
    returns_experts: bool = False,
) -> list[Slot]:
    """What to run on this node: engines, their devices, their log files (next to the rendezvous folder).

    shared: whose turn it is on GPUs that the trainer has, too. returns_experts: for routing replay.
    """
    rollout, engine = config.rollout, config.rollout.engine
    make_secret(folder / SECRET)
    address = node_network(config.cluster).address
    gpus, cpus = engine_gpus(config), sorted(os.sched_getaffinity(0))
    if not gpus:
        check_head_size(model)
    elif engine.tp * engine.dp > 1:
        check_message_room(len(gpus))
    limits = Limits(
        start_timeout_s=rollout.start_timeout_s,
        health_timeout_s=rollout.health_timeout_s,
        max_restarts=rollout.max_restarts,
        turn_timeout_s=rollout.turn_timeout_s,
    )

    def launch(placement: engine_command.Placement, port: int) -> tuple[list[str], dict[str, str]]:
        return (
            engine_command.command(
                model,
                engine,
                dtype=engine.dtype or config.model.dtype,
                max_length=config.model.max_length,
                address=address,
                port=port,
                on_gpu=bool(gpus),
                seed=config.run.seed,
                sleeps=shared is not None,
                has_weights=config.model.weights is None,
                returns_experts=returns_experts,
            ),
            engine_command.environment(os.environ, engine, placement, folder / SECRET, address),
        )

    slots = []
    for index in range(engine.per_node):
        size = engine.tp * engine.dp
        mine = tuple(gpus[index * size : (index + 1) * size])
        placement = engine_command.Placement(mine, share(cpus, index, engine.per_node))
        log_file = folder / f"engine_{node}_{index}.log"
        slots.append(
            Slot(node, index, address, folder, log_file, limits, partial(launch, placement), shared, engine.sleep_level)
        )
    return slots


def check_head_size(model: Path) -> None:
    """vLLM's attention on CPU knows certain head sizes only, and an engine would die of the first request."""
    try:
        config = read_json(model / "config.json")
        head_size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    except (OSError, ValueError, KeyError, AttributeError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{model}/config.json: cannot be read as a model's configuration: {error}") from None
    if head_size not in CPU_HEAD_SIZES:
        known = ", ".join(map(str, CPU_HEAD_SIZES))
        raise UserError(f"{model}/config.json: heads of size {head_size}; vLLM without GPUs knows {known}")


def engine_gpus(config: Config) -> list[str]:
    """The GPUs of this node's engines, engine after engine; empty on a node without GPUs.

    The last ones of the node where the trainer's ranks have the first (cluster.engines_on: trainer_nodes), else the
    first. Raises UserError if the node shows too few.
    """
    gpus, engine, needed = visible_gpus(), config.rollout.engine, engine_gpus_per_node(config)
    if gpus and len(gpus) < needed:
        raise UserError(
            f"rollout.engine: {engine.per_node} engines × tp {engine.tp} × dp {engine.dp} need {needed} GPUs; "
            f"this node shows {len(gpus)}"
        )
    return gpus[-needed:] if engine_placement(config) == "trainer_nodes" else gpus[:needed]


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them: an index, GPU-… or MIG-….

    As in CUDA, the first entry that is none of these ends the list (-1 and the empty text: no GPU).
    """
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        names = [name.strip() for name in given.split(",")]
        return list(takewhile(lambda name: name.isdigit() or name.startswith(("GPU-", "MIG-")), names))
    if not has_gpu_driver():
        return []
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def share(cpus: list[int], index: int, count: int) -> tuple[int, ...]:
    """This engine's part of the node's CPUs; all of them if there are fewer CPUs than engines."""
    return tuple(cpus[index * len(cpus) // count : (index + 1) * len(cpus) // count]) or tuple(cpus)


if __name__ == "__main__":
    sys.exit(main())
