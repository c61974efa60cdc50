"""Training checkpoints: model, optimizer, schedule position and the stage's own state, resharded on load.

``checkpoints/iter_0000120/`` holds one sub-folder per component ("actor", "critic"), each a complete
dist_checkpointing folder with its own manifest, from which an export needs nothing else; ``state.json``; and a
manifest over everything. It is written as ``.iter_0000120.tmp`` and renamed when all is there, so a kill in the middle
of a save costs that save only. There is no random state to save: nothing in a training step draws random numbers
(no dropout), and the order of the data is a function of the seed and the number of samples seen.
"""

import ctypes
import functools
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

from megatron_vcppo.config import Config
from megatron_vcppo.config.load import config_hash
from megatron_vcppo.config.training import CheckpointConfig
from megatron_vcppo.errors import UserError
from megatron_vcppo.mcore import optimizer as optim
from megatron_vcppo.mcore import runtime
from megatron_vcppo.mcore.architecture import Architecture
from megatron_vcppo.mcore.convert.folders import copy_small_files
from megatron_vcppo.mcore.learner import Learner
from megatron_vcppo.mcore.manifest import file_record, read_manifest, sync_folder, verify_manifest, write_manifest
from megatron_vcppo.mcore.model import PackedGPT
from megatron_vcppo.mcore.offload import check_resident
from megatron_vcppo.mcore.watchdog import deadline

PR_SET_PDEATHSIG = 1
_OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable"}
_COMPLETE = re.compile(r"iter_(\d{7,})$")


@dataclass(frozen=True)
class Resumed:
    """What a loaded checkpoint says besides the weights."""

    iteration: int
    state: dict[str, Any]
    """The stage's own state, as it was given to ``save``."""


class CheckpointFolder:
    """The checkpoints of one stage. Every method is collective.

    The small files of model.hf (config.json, tokenizer, chat template, …) travel with each component, so that a
    checkpoint can be exported alone.
    """

    def __init__(self, folder: Path, config: Config, settings: CheckpointConfig) -> None:
        """settings: the stage's own."""
        self.folder, self.hf_files, self.keep_last = folder, Path(config.model.hf), settings.keep_last
        self.config_hash = config_hash(config)
        self.runtime = runtime.current()
        self.queue = AsyncCallsQueue(persistent=False) if settings.async_save else None
        _queues()
        self.temporary = folder
        """What is being written, or was written last."""
        self.save_time_s = 0.0
        """Seconds that the last save kept training waiting."""
        if self.runtime.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(".*"):
                # A writer of an attempt that was killed may still be at work in it.
                shutil.rmtree(leftover, ignore_errors=True)
        dist.barrier()

    def save(self, iteration: int, components: Mapping[str, Learner], state: Mapping[str, Any]) -> None:
        """Save as ``iter_<iteration>``; with async_save, complete only after a later ``poll`` or ``finish``."""
        started = time.monotonic()
        for learner in components.values():
            check_resident(learner.storages())
        self.finish()
        temporary = self.folder / f".iter_{iteration:07d}.tmp"
        if self.runtime.is_main:
            shutil.rmtree(temporary, ignore_errors=True)  # left by a save that a signal or a full disk cut short
            for name in components:
                (temporary / name).mkdir(parents=True, exist_ok=True)
        dist.barrier()
        self.temporary = temporary
        requests = []
        with self._deadline():
            for name, learner in components.items():
                # Writers of two components that shared one could take each other's results for their own.
                filesystem_async._results_queue = _queues().Queue()
                request = dist_checkpointing.save(
                    _sharded_state(learner, is_loading=False),
                    str(temporary / name),
                    async_sharded_save=self.queue is not None,
                )
                requests.append(request)
        meta = {"iteration": iteration, "components": sorted(components), "config_hash": self.config_hash}
        # As text: the caller goes on with lists that it may have in there while a background save is under way.
        content = json.dumps(meta | {"state": dict(state)}, indent=1)

        def complete() -> None:
            self._complete(temporary, components, iteration, content)

        if self.queue is None:
            complete()
        else:
            requests[-1].finalize_fns.append(complete)
            for request in requests:
                if request.async_fn is not None:  # this rank has something to write
                    request = request._replace(async_fn=functools.partial(_write_in_background, request.async_fn))
                self.queue.schedule_async_request(request)
        self.save_time_s = time.monotonic() - started

    def poll(self) -> None:
        """Complete a background save if all ranks have written."""
        if self.queue is not None:
            self.queue.maybe_finalize_async_calls(blocking=False)

    def finish(self) -> None:
        """Wait for the background save."""
        if self.queue is not None:
            with self._deadline():
                self.queue.maybe_finalize_async_calls(blocking=True)

    def latest(self) -> Path | None:
        """The newest checkpoint that verifies; a damaged one is named on stderr and the one before is taken."""
        choice: list[str | None] = [None]

        def look(beat: Callable[[], None]) -> None:
            for path in sorted(complete_checkpoints(self.folder), reverse=True):
                try:
                    verify_manifest(path, on_progress=beat)
                except UserError as error:
                    print(f"warning: skipping a damaged checkpoint: {error}", file=sys.stderr, flush=True)
                    continue
                choice[0] = str(path)
                return

        runtime.on_main(look, f"checking the checkpoints in {self.folder}")
        dist.broadcast_object_list(choice, src=0)
        return Path(choice[0]) if choice[0] else None

    def resume(self, components: Mapping[str, Learner]) -> Resumed | None:
        """Load the newest good checkpoint into the components; None if there is none.

        Raises UserError, before anything is loaded, if it lacks a component or holds another model.
        """
        path = self.latest()
        if path is None:
            return None
        content = json.loads((path / "state.json").read_text())
        for name, learner in components.items():
            if name not in content["components"]:
                had = ", ".join(content["components"])
                raise UserError(f"{path}: holds {had} but no {name}: remove {self.folder} or take another run.dir")
            stored = Architecture.from_dict(read_manifest(path / name)["meta"]["architecture"])
            if differences := stored.differences(learner.model.arch):
                raise UserError(
                    f"{path}: the {name} is another model than model.hf: {differences}; "
                    f"remove {self.folder} or take another run.dir"
                )
        if content.get("config_hash") != self.config_hash and self.runtime.is_main:
            print(f"note: {path} was saved under another configuration", flush=True)
        for name, learner in components.items():
            load_learner(learner, path / name)
        return Resumed(content["iteration"], content["state"])

    def _complete(self, temporary: Path, components: Mapping[str, Learner], iteration: int, content: str) -> None:
        """Checksum what every rank wrote, write the manifests, rename, drop old checkpoints."""
        mine = {
            path.relative_to(temporary).as_posix(): file_record(path)
            for name in components
            for path in (temporary / name).glob(f"__{self.runtime.rank}_*")
        }
        records: list[dict[str, Any]] = [{} for _ in range(self.runtime.world_size)]
        dist.all_gather_object(records, mine)
        if self.runtime.is_main:
            known = {name: record for part in records for name, record in part.items()}
            for name, learner in components.items():
                copy_small_files(self.hf_files, temporary / name / "hf")
                inside = {k.removeprefix(f"{name}/"): v for k, v in known.items() if k.startswith(f"{name}/")}
                write_manifest(temporary / name, self._meta(learner, iteration), known=inside)
            (temporary / "state.json").write_text(content)
            write_manifest(temporary, {"iteration": iteration}, known=known)
            final = self.folder / temporary.name.removeprefix(".").removesuffix(".tmp")
            if final.exists():  # saved before, found damaged, trained again
                _remove(final)
            os.replace(temporary, final)
            sync_folder(self.folder)
            if self.keep_last:
                for old in sorted(complete_checkpoints(self.folder))[: -self.keep_last]:
                    _remove(old)
        dist.barrier()

    def _deadline(self) -> AbstractContextManager[None]:
        """Of waits for processes that write: one that was killed is waited for without end."""
        folder, rank = self.temporary, self.runtime.rank

        def written_bytes() -> int:
            try:
                return sum(file.stat().st_size for file in folder.glob(f"*/__{rank}_*"))
            except OSError:  # it was just renamed
                return -1

        return deadline(f"rank {rank}: writing {folder}", runtime.timeout_s(), written_bytes)

    def _meta(self, learner: Learner, iteration: int) -> dict[str, Any]:
        model = learner.model
        return {
            "kind": model.kind,
            "architecture": model.arch.to_dict(),
            "dtype": str(model.config.params_dtype).removeprefix("torch."),
            "tp": self.runtime.tp_size,
            "pp": self.runtime.pp_size,
            "iteration": iteration,
        }


def complete_checkpoints(folder: Path) -> list[Path]:
    """Folders that carry a final name; whether they are undamaged is the manifest's to say."""
    return [path for path in folder.glob("iter_*") if _COMPLETE.match(path.name)] if folder.is_dir() else []


def _remove(checkpoint: Path) -> None:
    """Take the final name away first: what a kill leaves half removed is no checkpoint."""
    leftover = checkpoint.with_name(f".{checkpoint.name}.old")
    os.replace(checkpoint, leftover)
    shutil.rmtree(leftover, ignore_errors=True)


def load_learner(learner: Learner, folder: Path) -> None:
    """Model, optimizer and schedule position from a component folder, whatever layout saved it."""
    loaded = dist_checkpointing.load(_sharded_state(learner, is_loading=True), str(folder))
    learner.model.load_state_dict(loaded["model"])
    inner = loaded["optimizer"].get("optimizer", loaded["optimizer"])
    if "state" in inner:
        # Megatron leaves a step count of zero out: the checkpoint was taken before this model's first step.
        inner["state"].setdefault("common_step", torch.tensor(0.0))
    learner.optimizer.load_state_dict(loaded["optimizer"])
    optim.apply_settings(learner.optimizer, learner.optimizer_config)
    learner.optimizer_steps = loaded["optimizer_steps"]


def load_model(model: PackedGPT, folder: Path, without: str | None = None) -> None:
    """Weights only, from a training checkpoint's component or an import, before a Learner is made of the model.

    without: prefix of parameters that the folder does not have and that keep their values ("value_head.").
    """
    wanted = model.sharded_state_dict()
    if without is not None:
        wanted = {name: value for name, value in wanted.items() if not name.startswith(without)}
    loaded = dist_checkpointing.load({"model": wanted}, str(folder))
    missing, unexpected = model.load_state_dict(loaded["model"], strict=False)
    missing = [name for name in missing if without is None or not name.startswith(without)]
    assert not missing and not unexpected, f"{folder}: missing {missing}, unexpected {unexpected}"


@functools.cache
def _queues() -> SyncManager:
    """The maker of the queues through which Megatron's writer processes report: a process that ends with this one.

    Megatron would start that process by spawn, which imports torch again (3.5 s at the first save of every rank), and
    would leave it behind when the rank is killed.
    """
    manager = SyncManager(ctx=multiprocessing.get_context("fork"))
    manager.start(_serve_queues)
    return manager


def _serve_queues() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    _end_with_parent()


def _write_in_background(write: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """In a process of its own, which must not outlive its rank: the next attempt writes the same files."""
    _end_with_parent()
    write(*args, **kwargs)


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _sharded_state(learner: Learner, is_loading: bool) -> dict[str, Any]:
    model = learner.model.sharded_state_dict()
    return {
        "model": model,
        "optimizer": learner.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=_OPTIMIZER_FORMAT),
        "optimizer_steps": learner.optimizer_steps,
    }
