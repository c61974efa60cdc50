"""Lets Megatron-Core 0.16 run on a machine without CUDA, over gloo. Does nothing where CUDA is available.

Megatron asks torch for "the current CUDA device" wherever it makes a tensor, and tests tensor types by the strings
of CUDA types. Everything that answers those questions differently on CPU is in this file; the rest of the project
knows only ``runtime.device()``. ``runtime.start`` calls ``install``; nothing is patched at import.
"""

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

_CPU = torch.device("cpu")

# Modules on our path that pass a literal device="cuda" to a tensor factory (megatron-core 0.16.1).
_LITERAL_CUDA = (
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.optimizer",
    "megatron.core.optimizer.grad_scaler",
    "megatron.core.transformer.utils",
    "megatron.core.utils",
    "megatron.core.dist_checkpointing.exchange_utils",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
)
_FACTORIES = ("zeros", "ones", "tensor", "empty", "full", "arange", "empty_like", "zeros_like", "ones_like")


class TorchOnCpu:
    """The name ``torch`` as one module of a library sees it: factories read device="cuda" as the CPU."""

    def __init__(self) -> None:
        for name in _FACTORIES:
            setattr(self, name, on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The same function, which reads device="cuda" as the CPU."""

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return make


def _cpu_rng_tracker() -> Any:
    """Megatron's tracker of named generator states, over the CPU generator."""
    from megatron.core.tensor_parallel import random

    class CpuRngStatesTracker(random.CudaRNGStatesTracker):
        def add(self, name: str, seed: int) -> None:
            assert name not in self.states_, f"random state {name} was added twice"
            self._is_initialized = True
            self.seeds_.add(seed)
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(self, name: str = random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
            outside = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outside)

    return CpuRngStatesTracker()


def _patch_torch() -> None:
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.cuda.empty_cache = lambda: None
    torch.cuda.manual_seed = lambda seed: torch.manual_seed(seed)  # type: ignore[assignment]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    plain_type = torch.Tensor.type

    def type_as_on_cuda(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        """``x.type()`` names the CUDA type, which Megatron compares with; ``x.type(dtype)`` converts as ever."""
        if dtype is not None:
            return plain_type(self, dtype, *args, **kwargs)
        return plain_type(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = type_as_on_cuda  # type: ignore[assignment,method-assign]


@functools.cache
def install() -> None:
    """Make Megatron-Core usable on CPU; a no-op with CUDA and at a second call."""
    if torch.cuda.is_available():
        return
    _patch_torch()
    for module in _LITERAL_CUDA:
        importlib.import_module(module).torch = TorchOnCpu()  # type: ignore[attr-defined]
    from megatron.core.tensor_parallel import random

    random._CUDA_RNG_STATE_TRACKER = _cpu_rng_tracker()
    random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    # Recomputation saves a "CUDA" and a CPU generator state: here they are the same generator.
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    _patch_token_dispatcher()


def _patch_token_dispatcher() -> None:
    """Counts of routed tokens are in host memory from the start: no stream copies them."""
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher as Dispatcher

    def as_numbers(self: Any, point: str, tokens_per_expert: torch.Tensor | None = None) -> torch.Tensor | None:
        for name in ("input_splits", "output_splits", "output_splits_tp"):
            if isinstance(splits := getattr(self, name), torch.Tensor):
                setattr(self, name, splits.numpy())
        return tokens_per_expert

    Dispatcher._maybe_dtoh_and_synchronize = as_numbers
    Dispatcher.cuda_dtoh_stream = object()  # it would make a stream if there were none
