"""Training checkpoints: model, optimizer, schedule position and the stage's own state, resharded on load.

``checkpoints/iter_0000120/`` holds one sub-folder per component ("actor", "critic"), each a complete
dist_checkpointing folder with its own manifest, from which an export needs nothing else; ``state.json``; and a
manifest over everything. It is written as ``.iter_0000120.tmp`` and renamed when all is there, so a kill in the middle
of a save costs that save only. A stage that was asked to stop within an iteration also has
``tensors_KofM.safetensors``, one file per replica: what the rest of the iteration needs and cannot be computed from
weights that have moved. There is no random state to save: nothing in a training step draws random numbers (no dropout),
and the order of the data is a function of the seed and the number of samples seen.
"""

import functools
import json
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_vcppo.config import CheckpointConfig, Config, LoraConfig
from megatron_vcppo.config.load import config_hash
from megatron_vcppo.errors import UserError
from megatron_vcppo.hf.adapters import META_KEY, StoredAdapters, is_adapter
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.hf.convert.folders import copy_small_files
from megatron_vcppo.hf.mapping import VOCABULARY
from megatron_vcppo.mcore import checkpoint_state, runtime
from megatron_vcppo.mcore.checkpoint_reader import load_tensors
from megatron_vcppo.mcore.checkpoint_writer import ComponentSave
from megatron_vcppo.mcore.learner import Learner
from megatron_vcppo.mcore.model import PackedGPT
from megatron_vcppo.mcore.offload import check_resident
from megatron_vcppo.mcore.rank_messages import broadcast_value, gather_values
from megatron_vcppo.run.access import as_made_here
from megatron_vcppo.run.files import move, read_json, remove, sync, write_text
from megatron_vcppo.run.folder import STATE_NAME, StageFolder, iteration_name, iteration_of
from megatron_vcppo.run.kept import KeptCheckpoints, remove_checkpoint
from megatron_vcppo.run.log import say
from megatron_vcppo.run.manifest import read_manifest, verify_manifest, write_manifest
from megatron_vcppo.run.processes import deadline

TENSORS_NAME = "tensors.safetensors"
ASIDE = ".replaced"


@dataclass(frozen=True)
class Resumed:
    """What a loaded checkpoint holds besides the weights."""

    iteration: int
    state: dict[str, Any]
    """The stage's own state, as it was given to ``save``."""
    tensor_files: tuple[Path, ...]
    """What each replica gave to ``save``, as safetensors, in the order of the replicas; empty if there is nothing."""


class CheckpointFolder:
    """The checkpoints of one stage. Every method is collective over all ranks.

    The small files of model.hf (config.json, tokenizer, chat template, …) travel with each component, so that a
    checkpoint can be exported alone.
    """

    def __init__(self, folder: Path, config: Config, settings: CheckpointConfig) -> None:
        """settings: the stage's own."""
        self.folder, self.hf_files, self.settings = folder, Path(config.model.hf), settings
        self.config_hash = config_hash(config)
        self.runtime = runtime.current()
        self.async_save = settings.async_save
        self.writing: dict[str, ComponentSave] = {}
        """The components of a save that is not complete yet."""
        self.complete: Callable[[Mapping[str, ComponentSave]], None]
        """What is to be done once they are written."""
        self.temporary = folder
        """What is being written, or was written last."""
        self.save_time_s = 0.0
        """Seconds that the last complete save took, until its files were written and checked. On the main rank."""
        self.saved_at = time.monotonic()
        """When the last save began, or the stage."""
        self.kept: KeptCheckpoints | None = None
        """On the main rank."""
        if self.runtime.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            self.kept = KeptCheckpoints(StageFolder(folder.parent), settings)
            _restore_replaced(folder)
            for leftover in folder.glob(".*"):
                # A writer of an attempt that was killed may still be at work in it.
                shutil.rmtree(leftover, ignore_errors=True)
        self.runtime.barrier()

    def is_due(self, iteration: int) -> bool:
        """Whether this iteration, which is complete and logged, is to be saved."""
        settings = self.settings
        if iteration % settings.save_every == 0 or (settings.keep_every and iteration % settings.keep_every == 0):
            return True
        if settings.save_every_s is None and settings.keep_best.metric is None:
            return False
        late = settings.save_every_s is not None and time.monotonic() - self.saved_at >= settings.save_every_s
        # The main rank's clock and log decide.
        return runtime.any_rank(self.kept is not None and (late or self.kept.takes_as_best(iteration)))

    def note(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """What is logged of an iteration, from which the best is found; not collective."""
        if self.kept is not None:
            self.kept.note(iteration, metrics)

    @property
    def unmeasured(self) -> str | None:
        """The metric of ``keep_best`` if nothing that was logged has it; on the main rank."""
        metric = self.settings.keep_best.metric
        return metric if self.kept is not None and not self.kept.scores else None

    def save(
        self,
        iteration: int,
        components: Mapping[str, Learner],
        state: Mapping[str, Any],
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Save as ``iter_<iteration>``; with async_save, complete only after a later ``poll`` or ``finish``.

        tensors: CPU tensors of the stage's own state, which each replica's leader writes. A checkpoint of this
        iteration that is there already is replaced once the new one is complete.
        """
        for learner in components.values():
            check_resident(learner.storages())
        self.finish()
        started = self.saved_at = time.monotonic()
        temporary = self.folder / f".{iteration_name(iteration)}.tmp"
        if self.runtime.is_main:
            shutil.rmtree(temporary, ignore_errors=True)  # left by a save that a signal or a full disk cut short
            for name in components:
                (temporary / name).mkdir(parents=True, exist_ok=True)
        self.runtime.barrier()
        if tensors and self.runtime.is_leader:
            path = temporary / f"tensors_{self.runtime.dp_rank}of{self.runtime.dp_size}.safetensors"
            save_file(dict(tensors), path)
            as_made_here(path)
            sync(path)
        self.temporary = temporary
        meta = {"iteration": iteration, "components": sorted(components), "config_hash": self.config_hash}
        # Serialized now: the caller may mutate ``state`` while the background save runs.
        content = json.dumps(meta | {"state": dict(state)}, indent=1)
        writing = {}
        with self._deadline():
            for name, learner in components.items():
                parts = {
                    "tensors": checkpoint_state.tensors_to_save(learner),
                    "optimizer_steps": learner.optimizer_steps,
                    "adam_steps": checkpoint_state.adam_steps(learner.optimizer),
                }
                writing[name] = ComponentSave(parts, temporary / name, self.async_save, started)
                if not self.async_save:
                    writing[name].wait()
        self.writing = writing
        self.complete = functools.partial(self._complete, temporary, components, iteration, content)
        if not self.async_save:
            self.finish()

    def poll(self) -> None:
        """Complete a background save if all ranks have written."""
        if self.writing and not runtime.any_rank(any(part.is_writing for part in self.writing.values())):
            self.finish()

    def finish(self) -> None:
        """Wait for the background save."""
        if not self.writing:
            return
        with self._deadline():
            for part in self.writing.values():
                part.wait()
        writing, self.writing = self.writing, {}
        self.complete(writing)

    def latest(self) -> Path | None:
        """The newest checkpoint that verifies; a damaged one is named and the one before is taken."""
        choice = ""

        def look(beat: Callable[[], None]) -> None:
            nonlocal choice
            for path in sorted(complete_checkpoints(self.folder), reverse=True):
                try:
                    verify_manifest(path, on_progress=beat)
                except UserError as error:
                    say(f"warning: skipping a damaged checkpoint: {error}")
                    continue
                choice = str(path)
                return

        runtime.on_main(look, f"checking the checkpoints in {self.folder}")
        choice = broadcast_value(choice, str, 0, device=self.runtime.device)
        return Path(choice) if choice else None

    def resume(self, components: Mapping[str, Learner]) -> Resumed | None:
        """Load the newest good checkpoint into the components; None if there is none.

        Raises UserError, before anything is loaded, if it lacks a component or holds another model.
        """
        path = self.latest()
        if self.kept is not None:
            self.kept.start((iteration_of(path.name) or 0) if path else 0)
        if path is None:
            return None
        content = _read_state(path / STATE_NAME)
        for name, learner in components.items():
            if name not in content["components"]:
                had = ", ".join(content["components"])
                raise UserError(f"{path}: holds {had} but no {name}: remove {self.folder} or take another run.dir")
            stored = Architecture.of_manifest(path / name, read_manifest(path / name)["meta"])
            if differences := stored.differences(learner.model.arch):
                raise UserError(
                    f"{path}: the {name} is another model than model.hf: {differences}; "
                    f"remove {self.folder} or take another run.dir"
                )
            check_adapters(learner.model, path / name)
        if content.get("config_hash") != self.config_hash and self.runtime.is_main:
            say(f"note: {path} was saved under another configuration")
        for name, learner in components.items():
            load_learner(learner, path / name)
        return Resumed(content["iteration"], content["state"], _tensor_files(path))

    def _complete(
        self,
        temporary: Path,
        components: Mapping[str, Learner],
        iteration: int,
        content: str,
        written: Mapping[str, ComponentSave],
    ) -> None:
        """Write the manifests with the checksums that the ranks' writers computed, rename, drop old checkpoints."""
        completing = time.monotonic()
        mine = {
            f"{name}/{file}": dict(record) for name, part in written.items() for file, record in part.finish().items()
        }
        records = gather_values(mine, dict[str, dict[str, Any]], self.runtime.device)
        if records is not None:
            known = {name: record for part in records for name, record in part.items()}
            for name, learner in components.items():
                copy_small_files(self.hf_files, temporary / name / "hf")
                inside = {k.removeprefix(f"{name}/"): v for k, v in known.items() if k.startswith(f"{name}/")}
                write_manifest(temporary / name, self._meta(learner, iteration), known=inside)
            write_text(temporary / STATE_NAME, content)
            write_manifest(temporary, {"iteration": iteration}, known=known)
            _put_in_place(temporary, self.folder / temporary.name.removeprefix(".").removesuffix(".tmp"))
            background_s = max(part.seconds for part in written.values())
            self.save_time_s = background_s + time.monotonic() - completing
            assert self.kept is not None
            self.kept.update(iteration)
            if keep_last := self.settings.keep_last:
                for old in sorted(complete_checkpoints(self.folder))[:-keep_last]:
                    remove_checkpoint(old)
        self.runtime.barrier()

    def _deadline(self) -> AbstractContextManager[None]:
        """Deadline for threads that write: a file system that hangs would otherwise block this rank forever."""
        folder, rank = self.temporary, self.runtime.rank

        def written_bytes() -> int:
            try:
                return sum(file.stat().st_size for file in folder.glob(f"*/__{rank}_*"))
            except OSError:  # it was just renamed
                return -1

        return deadline(f"rank {rank}: writing {folder}", self.runtime.timeout_s, written_bytes)

    def _meta(self, learner: Learner, iteration: int) -> dict[str, Any]:
        model = learner.model
        return {
            "kind": model.kind,
            "architecture": model.arch.to_dict(),
            "dtype": str(model.config.params_dtype).removeprefix("torch."),
            "tp": self.runtime.tp_size,
            "pp": self.runtime.pp_size,
            "iteration": iteration,
        } | ({} if model.stored_adapters is None else {META_KEY: model.stored_adapters.to_dict()})


def check_adapters(model: PackedGPT, folder: Path) -> None:
    """Raise UserError unless the component was saved from adapters like the model's on the same base, or from a model
    without adapters like this one."""
    stored, mine = StoredAdapters.of_manifest(folder, read_manifest(folder)["meta"]), model.stored_adapters
    if stored is not None:
        stored.check_settings(folder, mine.lora if mine is not None else LoraConfig())
    elif mine is not None:
        raise UserError(
            f"{folder}: has all weights, but model.lora.rank is {mine.lora.rank}: set it to null, or take another "
            "run.dir"
        )
    if stored is not None and mine is not None and stored.base.fingerprint != mine.base.fingerprint:
        raise UserError(
            f"{folder}: its adapters belong to the weights that were in {stored.base.path}, but this stage starts from "
            f"others, in {mine.base.path}"
        )


def _read_state(path: Path) -> dict[str, Any]:
    """UserError if the file is not what ``save`` wrote."""
    try:
        content = read_json(path)
        kinds = {"iteration": int, "components": list, "state": dict}
        if not all(isinstance(content[key], kind) for key, kind in kinds.items()):
            raise ValueError("iteration, components or state is of another type")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged: {error!r}") from None
    return content


def _tensor_files(checkpoint: Path) -> tuple[Path, ...]:
    """By replica. One file for all: of a checkpoint that was made when every rank held the whole batch."""
    found = {
        int(path.name.split("_")[1].partition("of")[0]): path for path in checkpoint.glob("tensors_*of*.safetensors")
    }
    whole = checkpoint / TENSORS_NAME
    return tuple(found[k] for k in sorted(found)) or ((whole,) if whole.exists() else ())


def complete_checkpoints(folder: Path) -> list[Path]:
    """Folders that carry a final name; whether they are undamaged is for ``verify_manifest`` to check."""
    return [path for path in folder.glob("*") if iteration_of(path.name) is not None]


def _put_in_place(temporary: Path, final: Path) -> None:
    """Give a checkpoint its final name.

    One that has it already (saved earlier in the same iteration, or found damaged and trained again) is moved aside
    first, under a name from which ``_restore_replaced`` brings it back after a kill.
    """
    aside = final.with_name(f".{final.name}{ASIDE}")
    if final.exists():
        remove(aside)
        move(final, aside)
    move(temporary, final)
    remove(aside)


def _restore_replaced(folder: Path) -> None:
    """Bring back a checkpoint that was moved aside for one that never came, because a kill fell between."""
    for aside in folder.glob(f".*{ASIDE}"):
        final = folder / aside.name.removeprefix(".").removesuffix(ASIDE)
        if not final.exists():
            move(aside, final)


def load_learner(learner: Learner, folder: Path, weights: bool = True) -> None:
    """Model, optimizer and schedule position from a component folder, whatever layout or optimizer saved it.

    weights: False if the model has the folder's weights already.
    """

    def choose(stored: Mapping[str, Any]) -> dict[str, Any]:
        _check_vocabulary(folder, stored, learner.model)
        return {"tensors": checkpoint_state.tensors_to_load(learner, stored, weights)}

    loaded = load_tensors(folder, choose)
    checkpoint_state.set_adam_steps(learner.optimizer, checkpoint_state.stored_adam_steps(loaded))
    learner.optimizer_steps = loaded["optimizer_steps"]


def _check_vocabulary(folder: Path, stored: Mapping[str, Any], model: PackedGPT) -> None:
    """UserError if a folder, which stores this by key, lacks rows of the vocabulary.

    More rows are padding for another number of tensor-parallel ranks. What the folder lacks of this model's padding is
    zero after a load, and neither read nor trained.
    """
    for key in VOCABULARY:
        entry = stored.get(key)
        if isinstance(entry, TensorStorageMetadata) and entry.size[0] < model.arch.vocab_size:
            raise UserError(f"{folder}: {key} has {entry.size[0]} rows, the model has {model.arch.vocab_size} tokens")


def load_model(model: PackedGPT, folder: Path, without: str | None = None) -> None:
    """Weights only, from a component with all weights or an import, before a Learner is made of the model.

    Adapters keep their values. without: prefix of parameters that the folder does not have and that keep theirs
    ("value_head.").
    """
    _load(model, folder, lambda name: not is_adapter(name) and not (without and name.startswith(without)))


def load_adapters(model: PackedGPT, folder: Path, without: str | None = None) -> None:
    """The same of a component that has adapters: these, and the value head unless ``without`` names it."""
    _load(model, folder, lambda name: model.is_stored(name) and not (without and name.startswith(without)))


def _load(model: PackedGPT, folder: Path, is_wanted: Callable[[str], bool]) -> None:
    wanted = {name: value for name, value in model.sharded_state_dict().items() if is_wanted(name)}

    def choose(stored: Mapping[str, Any]) -> dict[str, Any]:
        _check_vocabulary(folder, stored, model)
        return {"model": wanted}

    loaded = load_tensors(folder, choose)
    missing, unexpected = model.load_state_dict(loaded["model"], strict=False)
    missing = [name for name in missing if is_wanted(name)]
    assert not missing and not unexpected, f"{folder}: missing {missing}, unexpected {unexpected}"
