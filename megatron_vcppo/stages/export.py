"""The chain's actor as a Hugging Face folder, checked tensor by tensor and by its logits. One process does it."""

import os
import shutil
from pathlib import Path

from megatron_vcppo.config import Config
from megatron_vcppo.errors import UserError
from megatron_vcppo.hf.convert.adapter_weights import export_peft
from megatron_vcppo.hf.convert.exporter import export_hf
from megatron_vcppo.hf.convert.folders import unfinished
from megatron_vcppo.mcore.model import torch_dtype
from megatron_vcppo.run.folder import RunFolder
from megatron_vcppo.run.log import say
from megatron_vcppo.run.progress import Progress
from megatron_vcppo.stages.stage import actor_before, actor_stage_before

CRITIC_STAGES = ("ppo", "value_pretrain")
"""Those that leave a critic, the one that is exported first."""


def run(config: Config) -> None:
    """Write RUN/export/hf (or export.out). Raises UserError if a check fails; then the folder is not made."""
    if int(os.environ.get("RANK", "0")):
        return
    stage, checkpoint = actor_stage_before(config, "export"), actor_before(config, "export")
    if stage is None or checkpoint is None:
        raise UserError("stage export: no stage before it in this chain trains an actor; put sft or ppo before it")
    run_folder = RunFolder.of(config)
    if config.export.checkpoint != "last":
        checkpoint = stage.named_checkpoint(config.export.checkpoint) / "actor"
    folder = run_folder.stage("export").make()
    outputs = []
    if config.export.critic:
        with_it = checkpoint.with_name("critic")
        found = [with_it if with_it.is_dir() else None]
        found += [run_folder.stage(stage).last_checkpoint("critic") for stage in CRITIC_STAGES]
        critic = next(filter(None, found), None)
        if critic is None:
            raise UserError("export.critic: no finished stage of this run has a critic")
        export(config, critic, folder.exported("critic"))
        outputs.append("critic")
    if config.export.peft:
        out = folder.exported("peft")
        _remove_leftovers(config, out)
        dtype = torch_dtype(config.export.dtype) if config.export.dtype else None
        say(f"export: {checkpoint} -> {out}: {export_peft(checkpoint, out, Path(config.model.hf), dtype)}")
        outputs.append("peft")
    # Last: a folder elsewhere is not touched if it is there, so an attempt that made it must not be repeated.
    export(config, checkpoint, Path(config.export.out) if config.export.out else folder.exported("actor"))
    outputs += ["hf"] if config.export.out is None else []
    folder.mark_done(outputs=tuple(outputs))


def export(config: Config, checkpoint: Path, out: Path) -> None:
    """One checked export, with progress."""
    dtype = torch_dtype(config.export.dtype) if config.export.dtype else None
    _remove_leftovers(config, out)
    progress, seen = Progress("export", 100, unit="B"), 0

    def on_progress(done_bytes: int, total_bytes: int) -> None:
        nonlocal seen
        progress.update(100 * done_bytes // total_bytes, done_bytes - seen)
        seen = done_bytes

    checked = export_hf(checkpoint, out, dtype, config.export.verify_logits, on_progress, Path(config.model.hf))
    say(f"export: {checkpoint} -> {out}: {checked}")


def _remove_leftovers(config: Config, out: Path) -> None:
    if out.exists() and out.parent == RunFolder.of(config).stage("export").path:
        shutil.rmtree(out)  # from an attempt that was killed before it could say that it was done
    for leftover in unfinished(out):
        shutil.rmtree(leftover, ignore_errors=True)  # from an attempt that was killed at work
