"""The chain's last actor as a Hugging Face folder, checked tensor by tensor and by its logits. One process does it."""

import os
import shutil
from pathlib import Path

from megatron_vcppo.config import Config
from megatron_vcppo.errors import UserError
from megatron_vcppo.hf.convert.exporter import export_hf
from megatron_vcppo.hf.convert.folders import unfinished
from megatron_vcppo.mcore.model import torch_dtype
from megatron_vcppo.run.progress import Progress
from megatron_vcppo.stages.stage import actor_before, last_checkpoint, mark_done, stage_folder


def run(config: Config) -> None:
    """Write RUN/export/hf (or export.out). Raises UserError if a check fails; then the folder is not made."""
    if int(os.environ.get("RANK", "0")):
        return
    checkpoint = actor_before(config, "export")
    if checkpoint is None:
        raise UserError("stage export: no stage before it in this chain trains an actor; put sft or ppo before it")
    folder = stage_folder(config, "export")
    outputs = []
    if config.export.critic:
        critic = last_checkpoint(config, "ppo", "critic") or last_checkpoint(config, "value_pretrain", "critic")
        if critic is None:
            raise UserError("export.critic: no finished stage of this run has a critic")
        export(config, critic, folder / "critic")
        outputs.append("critic")
    # Last: a folder elsewhere is not touched if it is there, so an attempt that made it must not be repeated.
    export(config, checkpoint, Path(config.export.out) if config.export.out else folder / "hf")
    outputs += ["hf"] if config.export.out is None else []
    mark_done(folder, outputs=tuple(outputs))


def export(config: Config, checkpoint: Path, out: Path) -> None:
    """One checked export, with progress."""
    dtype = torch_dtype(config.export.dtype) if config.export.dtype else None
    if out.exists() and out.parent == stage_folder(config, "export"):
        shutil.rmtree(out)  # from an attempt that was killed before it could say that it was done
    for leftover in unfinished(out):
        shutil.rmtree(leftover, ignore_errors=True)  # from an attempt that was killed at work
    with Progress("export", 100, unit="B") as progress:
        seen = 0

        def on_progress(done_bytes: int, total_bytes: int) -> None:
            nonlocal seen
            progress.update(100 * done_bytes // total_bytes, done_bytes - seen)
            seen = done_bytes

        checked = export_hf(checkpoint, out, dtype, config.export.verify_logits, progress=on_progress)
    print(f"export: {checkpoint} -> {out}: {checked}", flush=True)
