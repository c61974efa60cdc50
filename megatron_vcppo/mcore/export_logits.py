"""A separate process: the logits of a short prompt from a Megatron checkpoint and from a Hugging Face folder.

``python -m megatron_vcppo.mcore.export_logits CHECKPOINT HF DTYPE BASE`` prints one JSON line. DTYPE is what the export
rounded the weights to, BASE a Hugging Face folder where those below adapters may be; "" if there is no such thing.
"""

import json
import os
import sys
from pathlib import Path

import torch

from megatron_vcppo.config import ModelConfig, ParallelConfig
from megatron_vcppo.data.packing import pack
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.mcore import runtime
from megatron_vcppo.mcore.model import build_actor, build_critic
from megatron_vcppo.mcore.starting_weights import load_component, lora_of
from megatron_vcppo.records import TrainSequence
from megatron_vcppo.run.manifest import read_manifest
from megatron_vcppo.run.processes import free_port

_NUM_TOKENS = 16


def megatron_logits(
    checkpoint: Path,
    arch: Architecture,
    kind: str,
    token_ids: list[int],
    dtype: torch.dtype | None,
    base: Path | None = None,
) -> torch.Tensor:
    """[tokens, vocabulary] float32 (a critic: [tokens, 1]), from weights rounded to ``dtype`` if it is given.

    base: where those below adapters may be, if they are a Hugging Face folder.
    """
    build = build_critic if kind == "critic" else build_actor
    settings = ModelConfig(hf=str(checkpoint / "hf"), dtype="float32", lora=lora_of(checkpoint))
    model = build(arch, settings, ParallelConfig())
    load_component(model, checkpoint, base)
    model.eval()
    if model.adapters is not None:
        model.adapters.merge()
    with torch.no_grad():
        if dtype is not None:
            for parameter in model.parameters():
                parameter.copy_(parameter.to(dtype))
        microbatch = pack([TrainSequence(tuple(token_ids))], [0])
        outputs = model.run(microbatch)[: len(token_ids)].float()
        return outputs[:, None] if kind == "critic" else outputs[:, : arch.vocab_size]


def hf_logits(folder: Path, kind: str, token_ids: list[int]) -> torch.Tensor:
    """The same from transformers: [tokens, vocabulary] float32 (a critic: [tokens, 1])."""
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

    auto = AutoModelForTokenClassification if kind == "critic" else AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([token_ids])).logits[0]


def main() -> None:
    """Compare and print."""
    checkpoint, folder = Path(sys.argv[1]), Path(sys.argv[2])
    meta = read_manifest(checkpoint)["meta"]
    arch, kind = Architecture.of_manifest(checkpoint, meta), meta["kind"]  # not the export's own
    port = str(free_port("127.0.0.1"))
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    runtime.start(ParallelConfig(), seed=0, timeout_s=600)
    token_ids = torch.randint(arch.vocab_size, (_NUM_TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
    dtype, base = sys.argv[3:5]
    rounded = getattr(torch, dtype) if dtype else None
    ours = megatron_logits(checkpoint, arch, kind, token_ids, rounded, Path(base) if base else None)
    theirs = hf_logits(folder, kind, token_ids)
    result = {
        "tokens": len(token_ids),
        "difference": (ours - theirs).abs().max().item(),
        "largest": theirs.abs().max().item(),
    }
    print(json.dumps(result))
    runtime.stop()


if __name__ == "__main__":
    main()
