"""Checkpoints that one device wrote and another one reads: the next training steps must come out the same."""

import tempfile
from pathlib import Path
from typing import Any

import torch

from tools.gpu_check.child import call
from tools.gpu_check.parity import te_installed
from tools.gpu_check.rows import Row, at_most

STEPS = 3
"""Trained before the save; then two more, which a resumed process repeats."""
TIMEOUT_S = 120.0
OPTIMIZERS = {"plain optimizer": False, "distributed optimizer": True}
Curve = dict[str, list[float]]
LIMITS = {"same": 1e-5, "other": 5e-3}
"""Largest relative difference of loss and gradient norm after a load on the same kind of layers and device (sums on a
GPU have no fixed order), or on another."""


def run(target: str, size: str) -> list[Row]:
    """A row per way from writer to reader and kind of optimizer. A place is (device, kind of layers)."""
    from tools.gpu_check.tiny import write_model

    places = [("cpu", "own")]
    if target == "cuda":
        places += [("cuda", "own")] + ([("cuda", "any")] if te_installed(target) else [])
    with tempfile.TemporaryDirectory(prefix="gpu_check_checkpoints_") as name:
        base = Path(name)
        arguments: dict[str, Any] = {"model": write_model(base / "model", "qwen3", size), "size": size}
        folders = {place: base / "_".join(place) for place in places}
        written = {place: _call("write", place, folder=folders[place], **arguments) for place in places}
        rows = []
        for reader in places:
            resumed = _call("read", reader, folders=folders, **arguments)
            for writer in places:
                for kind in OPTIMIZERS:
                    what = f"{label(writer)} → {label(reader)}, {kind}"
                    rows.append(row(what, resumed[writer, kind], written[writer][kind], writer == reader))
    return rows


def label(place: tuple[str, str]) -> str:
    """As the table names it."""
    return {"own": f"{place[0]}, own layers", "any": f"{place[0]}, Transformer Engine"}[place[1]]


def row(what: str, resumed: Curve | str, reference: Curve, same: bool) -> Row:
    """The largest relative difference of any loss or gradient norm; a text says why there is none."""
    if isinstance(resumed, str):
        return Row(what, resumed, "loads", "FAIL")
    pairs = [pair for name in reference for pair in zip(resumed[name], reference[name], strict=True)]
    return at_most(what, max(abs(a / b - 1) for a, b in pairs), LIMITS["same" if same else "other"])


def _call(function: str, place: tuple[str, str], **arguments: Any) -> Any:
    device, layers = place
    return call(f"tools.gpu_check.checkpoints:{function}", TIMEOUT_S, device=device, layers=layers, **arguments)


def write(model: Path, size: str, folder: Path) -> dict[str, Curve]:
    """In a child: train and save with each kind of optimizer; the steps after that."""
    with World(model, size) as world:
        return {kind: world.train(folder / kind, distributed, resume=False) for kind, distributed in OPTIMIZERS.items()}


def read(model: Path, size: str, folders: dict[Any, Path]) -> dict[Any, Curve | str]:
    """In a child: resume from what every place wrote; the steps after that, or the error in one line."""
    found: dict[Any, Curve | str] = {}
    with World(model, size) as world:
        for place, folder in folders.items():
            for kind, distributed in OPTIMIZERS.items():
                try:
                    found[place, kind] = world.train(folder / kind, distributed, resume=True)
                except Exception as error:  # of whatever kind: it is the finding
                    text = str(error).strip() or "no message"
                    found[place, kind] = f"{type(error).__name__}: {text.splitlines()[0]}"
    return found


class World:
    """One rank and the model that all train; a context manager."""

    def __init__(self, model: Path, size: str) -> None:
        self.model, self.size = model, size

    def __enter__(self) -> "World":
        from megatron_vcppo.config import ParallelConfig
        from megatron_vcppo.mcore import runtime

        torch.backends.cuda.matmul.allow_tf32 = False
        runtime.start(ParallelConfig(), seed=0, timeout_s=60)
        return self

    def __exit__(self, *_: object) -> None:
        from megatron_vcppo.mcore import runtime

        runtime.stop()

    def train(self, folder: Path, distributed: bool, resume: bool) -> Curve:
        """Train and save, or resume; then two steps: the first shows the weights, the second the optimizer's state."""
        from megatron_vcppo.config import CheckpointConfig, Config
        from megatron_vcppo.mcore.checkpoint import CheckpointFolder
        from megatron_vcppo.stages.training_losses import TokenLoss
        from tools.gpu_check import tiny

        config = Config()
        config.model.hf = str(self.model)
        checkpoints = CheckpointFolder(folder, config, CheckpointConfig())
        learners = {
            kind: tiny.learner(kind, self.model, lr=1e-3, distributed_optimizer=distributed)
            for kind in ("actor", "critic")
        }
        batch = tiny.microbatches(learners["actor"].model.arch, 2, self.size)
        count = tiny.num_loss_tokens(batch)
        losses = {"actor": TokenLoss(count), "critic": tiny.critic_loss(count)}

        def step() -> list[Any]:
            results = [learner.train_step(batch, losses[kind]) for kind, learner in learners.items()]
            assert all(result.applied for result in results), results
            return results

        if resume:
            resumed = checkpoints.resume(learners)
            assert resumed is not None and resumed.iteration == STEPS, f"nothing to resume in {folder}"
        else:
            for _ in range(STEPS):
                step()
            checkpoints.save(STEPS, learners, {})
            checkpoints.finish()
        results = step() + step()
        return {"loss": [r.metrics["loss"] for r in results], "grad_norm": [r.grad_norm for r in results]}
