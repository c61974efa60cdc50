"""One engine on a machine without accelerators: vLLM's own HTTP server, whose engine core is forked instead of spawned.

On a CPU vLLM spawns the core, which then imports all that the server has imported before: a third of an engine's start,
and 0.4 GB. ``fork`` is vLLM's default elsewhere; nothing computes in the server when it starts the core.
Importing this module imports what the server and its core need, but for engine_worker.py, which a core must import
itself.
"""

import multiprocessing

import vllm.entrypoints.launchers.api_server.entry
import vllm.v1.engine.core
import vllm.v1.engine.utils
import vllm.v1.worker.cpu_worker


def main() -> None:
    """Run the server with the arguments of the command line."""
    vllm.v1.engine.utils.get_mp_context = lambda: multiprocessing.get_context("fork")
    vllm.entrypoints.launchers.api_server.entry.main()


if __name__ == "__main__":
    main()
