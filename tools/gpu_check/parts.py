"""The parts of the check: what each one needs and which function runs it. Standard library only."""

import importlib.util
from dataclasses import dataclass
from typing import Any

TRAINER = (
    "torch", "megatron.core", "omegaconf", "safetensors", "xxhash", "psutil", "numpy", "yaml", "tqdm", "packaging",
)  # fmt: skip
"""Modules that the trainer imports on its way to a training step."""
PART_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Part:
    """A group of rows that is run in a separate process, at most PART_TIMEOUT_S."""

    name: str
    summary: str
    function: str
    """module:function; takes device and size, returns rows."""
    modules: tuple[str, ...]


PARTS = (
    Part("card", "what this GPU is and can do", "tools.gpu_check.card:run", ("torch",)),
    Part("parity", "own and Transformer Engine's layers against float32 on CPU", "tools.gpu_check.parity:run", TRAINER),
    Part("checkpoints", "save, load, resume; CPU to GPU and back", "tools.gpu_check.checkpoints:run", TRAINER),
    Part("push", "tests/gpu: weight push over NCCL, and other tests marked gpu", "tools.gpu_check.marked:run",
         (*TRAINER, "pytest", "pytest_timeout")),
    Part("kernels", "GAE and log-probs against a copy and plain PyTorch", "tools.gpu_check.kernels:run", TRAINER),
    Part("train", "training steps: MFU, peak memory against the plan", "tools.gpu_check.training:run", TRAINER),
    Part("fp8", "FP8 against bf16: loss curve, speed", "tools.gpu_check.training:run_fp8", TRAINER),
    Part("engine", "vLLM engine: start, push, sleep, wake", "tools.gpu_check.engine:run",
         (*TRAINER, "vllm", "aiohttp", "transformers")),
)  # fmt: skip


def look(modules: list[str]) -> dict[str, Any]:
    """In a child: which modules are missing here, and what PyTorch says of the GPU."""
    missing = [name for name in modules if not _there(name)]
    found: dict[str, Any] = {"missing": missing, "cuda": False, "device": "no PyTorch"}
    if "torch" in missing:
        return found
    import torch

    found["device"] = f"cpu, PyTorch {torch.__version__}"
    if torch.cuda.is_available():
        found["cuda"] = True
        name, count = torch.cuda.get_device_name(), torch.cuda.device_count()
        found["device"] = f"{name} (first of {count}), PyTorch {torch.__version__}, CUDA {torch.version.cuda}"
    return found


def _there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def reason_to_skip(part: Part, found: dict[str, Any], device: str) -> str:
    """Why a part cannot run, or "". found: what ``look`` reported."""
    missing = [name for name in part.modules if name in found["missing"]]
    if missing:
        return f"{', '.join(missing)} not installed (see --wheels)"
    if device == "cuda" and not found["cuda"]:
        return "no CUDA device"
    return ""
