"""Engines and trainer on the same GPUs (cluster.engines_on: trainer_gpus): who has the memory when.

The engines' turn lasts from a push to ``to_trainer``. Before it the trainer's optimizer state and gradients leave the
GPUs, and with weight_sync.offload_weights its weights, too, once they are pushed.
"""

import logging
import time
from typing import TypeAlias

import torch

from megatron_vcppo.config.placement import engine_nodes, node_holds_replica
from megatron_vcppo.errors import UserError
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.mcore.learner import Runner
from megatron_vcppo.mcore.model import torch_dtype
from megatron_vcppo.mcore.offload import HostMemory, Storage, drop_fp8_copies, weights
from megatron_vcppo.rollout.node_folder import TRAINER, Holder, NodeFolder
from megatron_vcppo.stages.stage import Stage
from megatron_vcppo.weight_sync.rank_role import make_sleeping_sync, role_of, role_on_node
from megatron_vcppo.weight_sync.sync import POLL_S, WeightSyncError

log = logging.getLogger(__name__)

Model: TypeAlias = Runner | torch.nn.Module


class SharedGpus:
    """This rank's part in the turns; every method is collective."""

    def __init__(self, stage: Stage) -> None:
        """Raises UserError if the layout and weight_sync do not go together."""
        config, runtime = stage.config, stage.runtime
        self.config = config
        num_nodes, rendezvous = config.cluster.trainer_nodes, stage.folder.rendezvous
        node, local_rank = divmod(runtime.rank, runtime.world_size // num_nodes)
        self.is_local_main = local_rank == 0
        self.node = NodeFolder(rendezvous, node)
        self.hold = self.node.hold(TRAINER)
        is_whole = node_holds_replica(config, runtime.world_size)
        uses_memory = is_whole and config.weight_sync.transport == "network"
        if config.weight_sync.offload_weights and not is_whole and config.weight_sync.transport == "network":
            raise UserError(
                f"weight_sync.offload_weights: with parallel.tp {runtime.tp_size} and pp {runtime.pp_size} on "
                f"{num_nodes} nodes of {runtime.world_size // num_nodes} ranks no node holds a whole replica, from "
                "whose weights in its memory an engine could start again: set it to false, or weight_sync.transport to "
                "disk"
            )
        if uses_memory and num_nodes > 1:
            role = role_on_node(runtime.pp_rank, runtime.rank, local_rank, runtime.tp_size, runtime.ep_size)
        else:
            role = role_of(runtime, config.weight_sync.max_senders)
        self.sync = make_sleeping_sync(config, rendezvous, role, runtime.device, self.node, uses_memory)
        self.sync.after_push = self._weights_leave
        if uses_memory and self.is_local_main:
            arch = Architecture.from_hf(config.model.hf)
            self.node.check_space(arch.parameter_count() * torch_dtype(config.model.dtype).itemsize)
        self.host = HostMemory()
        self.models: list[Model] = []
        self.engines_have_it = True
        self.num_engines = engine_nodes(config) * config.rollout.engine.per_node

    def share(self, *models: Model | None) -> None:
        """What is to leave the GPUs when the engines come."""
        self.models += [model for model in models if model is not None]

    def begin(self) -> None:
        """The first turn is the engines', whoever had the last one: they start before any model is built."""
        if self.is_local_main:
            self.node.drop_weights()
        self._give_turn("engines")

    def to_engines(self) -> None:
        """The trainer's state leaves the GPUs; the engines wake with the next push.

        Where the trainer's weights leave, too, an engine may have no room to start before that: one that waits for this
        turn to start is let start first, and is waited for, while the weights are away until the push.
        """
        if self.engines_have_it:
            return
        for model in self.models:
            drop_fp8_copies(model.model if isinstance(model, Runner) else model)
            parts = model.storages() if isinstance(model, Runner) else {}
            self.host.take(parts.get("optimizer state", []))
            self.host.take(parts.get("gradients", []), keep=False)
        first = self.config.weight_sync.offload_weights and len(self.sync.answering()) < self.num_engines
        if first:
            self.host.take(self._weights())
        self._give_turn("engines")
        self.engines_have_it = True
        if first:
            try:
                self.sync.wait_for_engines(self.num_engines, self.config.rollout.start_timeout_s)
            except WeightSyncError as error:
                log.warning("%s; the push goes to those that are", error)
            self.host.give_back(self._weights())

    def to_trainer(self) -> None:
        """The engines sleep, and the trainer's state comes back. An engine that starts now is waited for.

        Raises WeightSyncError naming engines that keep the memory, TimeoutError naming those that still start.
        """
        if not self.engines_have_it:
            return
        self._give_turn("trainer")
        self._wait_for_starting()
        self.sync.put_to_sleep(self.config.rollout.engine.sleep_level)
        self._wait_for_starting()  # those that were withdrawn meanwhile are being ended
        self.sync.held_version = None
        if self.sync.role.is_sender:
            self.sync.transport.drop()
        self.host.give_back()
        self.engines_have_it = False

    def close(self) -> None:
        """No more turns: no weights stay in the node's memory, and the trainer keeps the GPUs until it ends."""
        if self.is_local_main:
            self.node.drop_weights()

    def _weights_leave(self) -> None:
        if self.config.weight_sync.offload_weights:
            self.host.take(self._weights())
        self.sync.ranks.barrier()  # engines take their cache when the last rank is done

    def _weights(self) -> list[Storage]:
        models = [model.model if isinstance(model, Runner) else model for model in self.models]
        return [storage for model in models for storage in weights(model)]

    def _give_turn(self, holder: Holder) -> None:
        """All ranks have got here when it returns, and every node knows."""
        self.sync.ranks.barrier()
        if self.is_local_main:
            self.node.give_turn(holder)
        self.sync.ranks.barrier()

    def _wait_for_starting(self) -> None:
        timeout_s = self.config.rollout.start_timeout_s
        deadline = time.monotonic() + timeout_s
        while starting := self._starting():
            if self.sync.ranks.any(time.monotonic() > deadline)[0]:
                raise TimeoutError(f"{', '.join(starting)} not ready after {timeout_s:g} s (rollout.start_timeout_s)")
            time.sleep(POLL_S)

    def _starting(self) -> list[str]:
        """By node, of the first ones that have any."""
        mine = self.node.starting() if self.is_local_main else []
        return [names for _, names in self.sync.ranks.texts(", ".join(mine))]
