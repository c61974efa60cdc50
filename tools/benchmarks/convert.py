"""Import and export against a plain file copy of the same bytes, each in its own process: GB/s and peak memory.

A random model of at least the given size is written to a scratch folder, and everything is removed afterwards.
Every case ends with its bytes synced to disk. Random weights take as long as trained ones.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_HIDDEN, _FFN, _VOCABULARY, _HEADS, _KV_HEADS = 2048, 8192, 65536, 16, 8
_TIMEOUT_S = 3600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Size, layout, place."""
    parser.add_argument("--gb", type=float, default=2.2, help="size of the model's bfloat16 weights in 10⁹ bytes")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--pp", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2, help="the best of this many runs counts")
    parser.add_argument("--scratch", type=Path, help="folder on the disk to measure (default: the system's)")


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One line per case: seconds, GB/s, the ratio to the copy, peak resident memory."""
    with tempfile.TemporaryDirectory(prefix="bench_convert_", dir=args.scratch) as name:
        folder = Path(name)
        num_layers, largest = _write_model(folder / "hf", args.gb, args.pp)
        weights = list((folder / "hf").glob("*.safetensors"))
        num_bytes = sum(path.stat().st_size for path in weights)
        cases: dict[str, tuple[Callable[..., None], tuple[Any, ...]]] = {
            "copy": (_copy, (folder / "hf", folder / "copied")),
            "import": (_import, (folder / "hf", folder / "imported", args.tp, args.pp)),
            "export": (_export, (folder / "imported", folder / "exported")),
        }
        runs: dict[str, list[tuple[float, int]]] = {case: [] for case in cases}
        for _ in range(args.repeats):  # rounds over all cases, so that all of them meet the same disturbances
            for case, (function, arguments) in cases.items():
                shutil.rmtree(arguments[1], ignore_errors=True)
                runs[case].append(_measure(function, arguments))
        copy_s = min(runs["copy"])[0]
        for case in cases:
            seconds, added_bytes = min(runs[case])
            yield {
                "case": case,
                "weights_gb": round(num_bytes / 1e9, 2),
                "layers": num_layers,
                "tp": args.tp,
                "pp": args.pp,
                "seconds": round(seconds, 2),
                "gb_per_s": round(num_bytes / 1e9 / seconds, 2),
                "speed_of_copy": round(copy_s / seconds, 2),
                "peak_memory_mb": round(added_bytes / 1e6),
                "largest_tensor_mb": round(largest / 1e6),
            }


def _write_model(folder: Path, gigabytes: float, pp: int) -> tuple[int, int]:
    """A Llama of random bytes with about as many layers as the size needs; returns layers and the largest tensor."""
    import numpy as np
    import torch

    from megatron_vcppo.hf.architecture import Architecture
    from megatron_vcppo.hf.mapping import hf_shapes, parameters
    from megatron_vcppo.hf.safetensors_files import plan_files
    from megatron_vcppo.integers import ceil_div

    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": _HIDDEN,
        "intermediate_size": _FFN,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS,
        "vocab_size": _VOCABULARY,
        "max_position_embeddings": 4096,
        "num_hidden_layers": pp,
        "torch_dtype": "bfloat16",
    }
    one_stack = Architecture.from_config(config).parameter_count()
    per_stack = one_stack - 2 * _VOCABULARY * _HIDDEN - _HIDDEN
    stacks = ceil_div(int(gigabytes * 1e9 / 2 - (one_stack - per_stack)), per_stack)
    config["num_hidden_layers"] = max(1, stacks) * pp
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shapes = hf_shapes(parameters(Architecture.from_hf(folder)))
    placed = plan_files(folder, {name: (shape, torch.bfloat16) for name, shape in shapes.items()}, 2_000_000_000)
    generator = np.random.default_rng(0)
    for tensor in placed.values():
        with open(tensor.path, "r+b") as stream:
            stream.seek(tensor.offset)
            stream.write(generator.bytes(tensor.num_bytes))
            stream.flush()
            os.fsync(stream.fileno())
    return Architecture.from_hf(folder).num_layers, max(tensor.num_bytes for tensor in placed.values())


def _measure(function: Callable[..., None], arguments: tuple[Any, ...]) -> tuple[float, int]:
    """Run in a fresh process: seconds, and how many bytes its resident memory rose at most."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        if not receiver.poll(_TIMEOUT_S):
            raise TimeoutError(f"{function.__name__} took longer than {_TIMEOUT_S} s")
        return receiver.recv()
    finally:
        process.kill()
        process.join()


def _child(sender: Any, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    # Imports are not what is measured.
    import megatron_vcppo.hf.convert.exporter
    import megatron_vcppo.hf.convert.importer  # noqa: F401
    from tools.benchmarks._measure import peak_bytes

    seconds = 0.0

    def timed() -> None:
        nonlocal seconds
        started = time.perf_counter()
        function(*arguments)
        seconds = time.perf_counter() - started

    added_bytes = peak_bytes(timed)
    sender.send((seconds, added_bytes))


def _copy(source: Path, target: Path) -> None:
    target.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, target / path.name)
        with open(target / path.name, "rb") as stream:
            os.fsync(stream.fileno())


def _import(source: Path, target: Path, tp: int, pp: int) -> None:
    from megatron_vcppo.hf.convert.importer import import_hf

    import_hf(source, target, tp, pp)


def _export(source: Path, target: Path) -> None:
    from megatron_vcppo.hf.convert.exporter import export_hf

    export_hf(source, target, verify_logits=False)
