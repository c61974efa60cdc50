"""Makes ``import transformer_engine`` work on a machine without CUDA: its Python is real, its extension is ours.

For a process of its own: what it changes is never undone, and Megatron decides at import whether it has Transformer
Engine. Call ``install`` before anything imports megatron.
"""

import importlib
import os
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parents[3]
FOLDER = Path(os.environ.get("TE_PYTHON", ROOT / ".te"))
"""Where tools/install_te.sh puts the package."""
EXTENSION = Path(__file__).with_name("transformer_engine_torch.py")
_HOPPER = SimpleNamespace(major=9, minor=0, name="H100", multi_processor_count=132, total_memory=80 << 30)


def installed() -> bool:
    return (FOLDER / "transformer_engine").is_dir()


def install() -> None:
    """Import transformer_engine.pytorch, with the device that its choices see being an H100 and tensors on the CPU."""
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # do not load CUDA's libraries
    os.environ["NVTE_UNFUSED_FP8_UPDATE"] = "1"  # the history of "delayed" scales is kept by Python
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # fusions run as they are written: compiling them takes seconds each
    sys.path.append(str(FOLDER))
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the shared object that is not there yet
        common = importlib.import_module("transformer_engine.common")
        common._get_shared_object_file = lambda library: EXTENSION  # type: ignore[attr-defined]
        importlib.import_module("transformer_engine.pytorch")
    # It took the names that the extension lists; those of functions that ours lacks are made when they are asked for.
    passed_on = importlib.import_module("transformer_engine.pytorch.cpp_extensions")
    passed_on.__getattr__ = sys.modules["transformer_engine_torch"].__getattr__  # type: ignore[method-assign]
    from megatron_vcppo.mcore import cpu_shim

    cpu_shim.install()

    class Cuda:
        """torch.cuda as Transformer Engine sees it."""

        is_available = staticmethod(lambda: True)
        get_device_properties = staticmethod(lambda *_: _HOPPER)
        get_device_capability = staticmethod(lambda *_: (_HOPPER.major, _HOPPER.minor))
        is_current_stream_capturing = staticmethod(lambda: False)

        def __getattr__(self, name: str) -> Any:
            return getattr(torch.cuda, name)

    # Transformer Engine refuses tensors that are not CUDA's; torch and Megatron must be told the truth.
    torch.Tensor.is_cuda = property(  # type: ignore[assignment]
        lambda _: sys._getframe(1).f_globals["__name__"].startswith("transformer_engine")
    )
    torch.Tensor.to = cpu_shim.on_cpu(torch.Tensor.to)  # type: ignore[method-assign]
    view = cpu_shim.TorchOnCpu()
    view.cuda, view.version = Cuda(), SimpleNamespace(cuda="13.0")  # type: ignore[attr-defined]
    for name, module in list(sys.modules.items()):
        if name.startswith("transformer_engine.pytorch") and getattr(module, "torch", None) is torch:
            module.torch = view  # type: ignore[attr-defined]
