"""Calls in interpreters of their own: a crash, a hang or full memory costs one call, and each sees what it should.

``device="cpu"`` hides GPUs, ``layers="own"`` hides Transformer Engine, before anything that looks for them is imported.
Standard library only, so that a machine without PyTorch can say what it lacks.
"""

import importlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from megatron_vcppo.run.processes import die_with_parent, free_port

EXTRA_SITE = "GPU_CHECK_SITE"
"""Variable with the folder of unpacked wheels, which comes last on the path."""


class ChildFailed(RuntimeError):
    """A call raised, died or took too long; the message is one line."""


def call(function: str, timeout_s: float, *, device: str = "cuda", layers: str = "any", **arguments: Any) -> Any:
    """Result of ``module:function`` with these arguments (all picklable) in a fresh interpreter; its output is ours.

    layers: own | any. Raises ChildFailed.
    """
    env = dict(os.environ)
    if device == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
    port = str(free_port("127.0.0.1"))
    env |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as name:
        request, result, error = (Path(name) / file for file in ("request", "result", "error"))
        request.write_bytes(pickle.dumps((function, layers, arguments, str(result), str(error))))
        process = subprocess.Popen(
            [sys.executable, "-m", "tools.gpu_check.child", str(request)], env=env, start_new_session=True
        )
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise ChildFailed(f"{function} did not end within {timeout_s:g} s") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if code:
            reason = error.read_text() if error.exists() else f"exit code {code}"
            raise ChildFailed(f"{function}: {reason}")
        return pickle.loads(result.read_bytes())


def find_packages() -> None:
    """Put the folder of unpacked wheels at the end of the path: what the machine has comes first."""
    if (folder := os.environ.get(EXTRA_SITE)) and folder not in sys.path:
        sys.path.append(folder)


def main() -> None:
    """Serve one request."""
    die_with_parent()
    function, layers, arguments, result, error = pickle.loads(Path(sys.argv[1]).read_bytes())
    find_packages()
    if layers == "own":
        sys.modules["transformer_engine"] = None  # type: ignore[assignment] # what Python takes for "not installed"
    module, name = function.split(":")
    try:
        returned = getattr(importlib.import_module(module), name)(**arguments)
        Path(result).write_bytes(pickle.dumps(returned))
    except BaseException as exception:
        text = str(exception).strip() or "no message"
        Path(error).write_text(f"{type(exception).__name__}: {text.splitlines()[0]}")
        raise


if __name__ == "__main__":
    main()
