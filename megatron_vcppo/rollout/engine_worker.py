"""What every vLLM worker process imports: the receiving end of a weight push.

Importing this module (vLLM does it through ``--worker-extension-cls``) registers the weight-transfer engine "vcppo"
in the worker. Four things that a plain ``model.load_weights`` gets wrong, without an error on the second:
linear layers are stored repacked for oneDNN, so loading goes through vLLM's layer-wise reload; with tied embeddings
the output layer keeps its old repacked copy on CPU, so it is repacked by hand; experts are repacked on CPU only when
their kernel is made, so it is made again; and the base class ends an update with an accelerator call that does not
exist on CPU.
"""

import multiprocessing
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from typing_extensions import override
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from megatron_vcppo.rollout.broadcast import ahead, receive, unpack
from megatron_vcppo.rollout.group import Deadline, Group, join_group, reach_store
from megatron_vcppo.rollout.messages import GroupAddress, SyncRequest
from megatron_vcppo.rollout.weight_files import read_folder
from megatron_vcppo.run.processes import die_with_parent
from megatron_vcppo.run.secret import SECRET_FILE_VARIABLE, read_secret

BACKEND = "vcppo"


@dataclass
class InitInfo(WeightTransferInitInfo):
    """The push that is about to start: a messages.SyncRequest as plain types."""

    request: dict[str, Any] = field(default_factory=dict)


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """Empty: tensor names and shapes travel with the stream."""


class Receiver(WeightTransferEngine[InitInfo, UpdateInfo]):
    """One worker's end of a push. Each update is the whole model: all streams, or all files of the folder."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.groups: dict[GroupAddress, Group] = {}
        self.request: SyncRequest | None = None

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Join the group of each stream, unless it is the one of the push before."""
        self.request = request = msgspec.convert(init_info.request, SyncRequest)
        parallel = self.parallel_config
        worker = parallel.data_parallel_index * parallel.world_size + parallel.rank
        deadline = Deadline(request.timeout_s)
        senders = [sender for stream in request.streams for sender in stream]
        self.leave([sender for sender in self.groups if sender not in senders])
        for sender in senders:
            if sender not in self.groups:
                store = reach_store(sender.address, sender.port, deadline.left_s())
                self.groups[sender] = join_group(
                    store,
                    rank=sender.first_rank + worker,
                    world_size=sender.world_size,
                    backend=request.backend,
                    device=self.device,
                    timeout_s=deadline.left_s(),
                    address=request.address,
                    secret=read_secret(Path(os.environ[SECRET_FILE_VARIABLE])),
                )
            self.groups[sender].deadline = deadline

    def leave(self, senders: Iterable[GroupAddress]) -> None:
        """Close the groups of these senders."""
        for sender in list(senders):
            self.groups.pop(sender).close()

    @override
    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)
        if self.device.type == "cpu":
            for module in self.model.modules():
                method: Any = getattr(module, "quant_method", None)
                if getattr(method, "moe_kernel", None) is not None:
                    method.moe_kernel = None

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Take the whole model; after a failure the engine is whole again in form, and a new push may follow."""
        try:
            self.receive_weights(self.parse_update_info(update_info))
        except BaseException:
            self.leave(self.groups)
            self.finish_weight_update()
            raise
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    @override
    def receive_weights(self, update_info: UpdateInfo) -> None:
        assert self.request is not None
        if self.request.backend == "disk":
            tensors = read_folder(Path(self.request.folder))
        else:
            streams = [[self.groups[sender] for sender in stream] for stream in self.request.streams]
            tensors = unpack(ahead(receive(streams), streams[0][0].lane))
        loaded = self.model.load_weights(tensors)
        missing = {name for name, _ in self.model.named_parameters()} - loaded
        if self.model_config.hf_text_config.tie_word_embeddings:
            missing.discard("lm_head.weight")  # while it is being reloaded, it shows as a separate parameter
        if missing:
            raise RuntimeError(f"the push lacked {len(missing)} parameters, e.g. {sorted(missing)[:3]}")

    @override
    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            for module in self.model.modules():
                if isinstance(module, ParallelLMHead):
                    module.quant_method.process_weights_after_loading(module)

    @override
    def shutdown(self) -> None:
        self.leave(self.groups)


class WorkerExtension:
    """Mixed into vLLM's worker; its import is what counts."""


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, Receiver)
if multiprocessing.parent_process() is not None:
    die_with_parent()
