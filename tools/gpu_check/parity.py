"""Logits, log-probs, values and gradients of all families: both kinds of layers on the device against own layers on
the CPU in float32, from the same weights."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tools.gpu_check.child import ChildFailed, call
from tools.gpu_check.rows import Row, at_most, skipped

FAMILIES = ("qwen2", "qwen3", "qwen3_moe", "llama")
Outputs = dict[str, Tensor]
LIMITS = {
    # Without TF32 only the order of sums differs; Transformer Engine's float32 products use TF32 (10 bits).
    ("own", "float32"): {"logits": 1e-4, "logprobs": 1e-4, "values": 1e-4, "gradients": 1e-3},
    ("te", "float32"): {"logits": 5e-3, "logprobs": 5e-3, "values": 5e-3, "gradients": 1e-2},
    ("own", "bfloat16"): {"logits": 5e-2, "logprobs": 5e-2, "values": 5e-2, "gradients": 1e-1},
    ("te", "bfloat16"): {"logits": 5e-2, "logprobs": 5e-2, "values": 5e-2, "gradients": 1e-1},
}
"""Largest ‖out − reference‖ / ‖reference‖."""
TIMEOUT_S = 200.0


def run(target: str, size: str) -> list[Row]:
    """Rows per kind of layers, type and output; each is the worst of the families."""
    from tools.gpu_check.tiny import write_model

    with tempfile.TemporaryDirectory(prefix="gpu_check_parity_") as name:
        folders = {family: write_model(Path(name) / family, family, size) for family in FAMILIES}
        collect = "tools.gpu_check.parity:collect"
        dtypes = ("float32", "bfloat16")
        arguments: dict[str, Any] = {"folders": folders, "size": size}
        reference = call(collect, TIMEOUT_S, device="cpu", layers="own", dtypes=("float32",), **arguments)
        rows = compare(
            "own", call(collect, TIMEOUT_S, device=target, layers="own", dtypes=dtypes, **arguments), reference
        )
        if not te_installed(target):
            return [*rows, skipped("Transformer Engine's layers", "Transformer Engine is not installed, or no CUDA")]
        try:
            found, why = call(f"{collect}_with_attention", TIMEOUT_S, device=target, dtypes=dtypes, **arguments)
            rows += compare("te", found, reference)
            rows.append(Row("te layers, bfloat16, attention", why or "fused", "fused", "FAIL" if why else "ok"))
        except ChildFailed as error:
            rows.append(Row("Transformer Engine's layers", str(error), "run", "FAIL"))
        return rows


def te_installed(target: str) -> bool:
    """Whether models on this device have Transformer Engine's layers."""
    from megatron_vcppo.config import ModelConfig
    from megatron_vcppo.mcore.layers import uses_transformer_engine

    return target == "cuda" and uses_transformer_engine(ModelConfig())


def collect(folders: dict[str, Path], dtypes: tuple[Any, ...], size: str) -> dict[str, dict[str, Outputs]]:
    """In a child: dtype -> family -> outputs on this process's device, as float32 on the CPU."""
    from megatron_vcppo.config import ParallelConfig
    from megatron_vcppo.mcore import runtime

    torch.backends.cuda.matmul.allow_tf32 = False
    runtime.start(ParallelConfig(), seed=0, timeout_s=120)
    found = {dtype: {family: outputs(folder, dtype, size) for family, folder in folders.items()} for dtype in dtypes}
    runtime.stop()
    return found


def collect_with_attention(**arguments: Any) -> tuple[dict[str, dict[str, Outputs]], str | None]:
    """The same, and what is wrong with the attention that the last of it, in bfloat16, took."""
    from megatron_vcppo.mcore.layers import unfused_attention

    return collect(**arguments), unfused_attention()


def outputs(folder: Path, dtype: Any, size: str) -> Outputs:
    """Everything that is compared, of one model."""
    from megatron_vcppo.mcore.hf_weights_io import local_parameters
    from megatron_vcppo.stages.training_losses import TokenLoss
    from tools.gpu_check import tiny

    actor, critic = (tiny.learner(kind, folder, dtype) for kind in ("actor", "critic"))
    batch = tiny.microbatches(actor.model.arch, 1, size)
    found: Outputs = {}
    with torch.no_grad():
        found["logits"] = torch.cat([actor.model.run(m.to(actor.runtime.device)) for m in batch])
    # The padding of the vocabulary differs from family to family; its logits mean nothing.
    found["logits"] = found["logits"][:, : actor.model.arch.vocab_size]
    found["logprobs"] = torch.cat(actor.logprobs(batch))
    found["values"] = torch.cat(critic.values(batch))
    count = tiny.num_loss_tokens(batch)
    for learner, loss in ((actor, TokenLoss(count)), (critic, tiny.critic_loss(count))):
        result = learner.train_step(batch, loss)  # at a learning rate of 0
        assert result.applied, f"not finite: {result}"
        kind = learner.model.kind
        gradients = {
            entry.name: p.main_grad.flatten().clone()  # type: ignore[attr-defined]  # Megatron's
            for p, entry in local_parameters(learner.model)
        }
        found[f"gradients {kind}"] = torch.cat([gradients[name] for name in sorted(gradients)])
    return {name: tensor.detach().float().cpu() for name, tensor in found.items()}


def compare(layers: str, found: dict[str, dict[str, Outputs]], reference: dict[str, dict[str, Outputs]]) -> list[Row]:
    """The worst family of every output."""
    rows = []
    for dtype, families in found.items():
        for output in next(iter(families.values())):
            errors = {name: distance(out[output], reference["float32"][name][output]) for name, out in families.items()}
            # NaN is the worst of all, but the largest for no comparison.
            worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
            limit = LIMITS[layers, dtype][output.split()[0]]
            rows.append(at_most(f"{layers} layers, {dtype}, {output} ({worst})", errors[worst], limit))
    return rows


def distance(out: Tensor, reference: Tensor) -> float:
    """‖out − reference‖ / ‖reference‖."""
    return float((out.double() - reference.double()).norm() / reference.double().norm())
