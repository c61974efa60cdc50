"""A process that has Transformer Engine, and runs functions on gloo ranks forked from it."""

import io
import multiprocessing
import pickle
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from tests.helpers.te.install import install

Call = Callable[..., list[Any]]
START_S = 240.0
"""Deadline of importing torch, Transformer Engine and Megatron, from cold files on a busy machine."""


@contextmanager
def te_process() -> Iterator[Call]:
    """A function like ``run_distributed_test``, whose ranks have Transformer Engine.

    fn must be a module's function: the process is a fresh interpreter, started once for all tests of a file.
    """
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(there,), daemon=False)
    process.start()
    there.close()
    try:
        if not here.poll(START_S):
            raise TimeoutError(f"the process with Transformer Engine was not ready after {START_S:g} s")
        here.recv()

        def call(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 60.0, **kw: Any) -> list[Any]:
            here.send_bytes(pickle.dumps((fn, world_size, args, kw | {"timeout_s": timeout_s})))
            if not here.poll(timeout_s + 30):
                raise TimeoutError(f"{fn.__name__} with Transformer Engine gave no answer in {timeout_s + 30:g} s")
            error, content = pickle.loads(here.recv_bytes())
            if error:
                raise AssertionError(error)
            import torch

            return torch.load(io.BytesIO(content), weights_only=False)

        yield call
    finally:
        process.kill()
        process.join()


def _serve(connection: Connection) -> None:
    """Answer calls until the other end closes."""
    from megatron_vcppo.run.processes import die_with_parent
    from tests.helpers.distributed import run_distributed_test

    die_with_parent()
    install()
    import torch

    import megatron_vcppo.mcore.learner  # noqa: F401  (forked ranks have it)

    connection.send("ready")
    while True:
        try:
            fn, world_size, args, kwargs = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        content = io.BytesIO()
        error = ""
        try:
            torch.save(run_distributed_test(fn, world_size, *args, **kwargs), content)
        except BaseException:
            error = traceback.format_exc()
        connection.send_bytes(pickle.dumps((error, content.getvalue())))
