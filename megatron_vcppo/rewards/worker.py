"""A process that runs verifiers and tools for the scorer: one JSON request, one JSON reply, over a socket.

A separate process, because a verifier may hang, leak, or die, and is then killed without harm to the run.
"""

import json
import math
import resource
import signal
import socket
import sys
from collections.abc import Mapping
from typing import Any

from megatron_vcppo.config import CodeRewardConfig
from megatron_vcppo.records import Prompt
from megatron_vcppo.rewards.registry import resolve_verifiers
from megatron_vcppo.rewards.tools import MAX_OBSERVATION, Tool, resolve_tools
from megatron_vcppo.rewards.verifier import Verifier
from megatron_vcppo.rewards.worker_messages import receive, send


def main(descriptor: int, settings: dict[str, Any]) -> None:
    """Serve until the other side closes the socket.

    settings: ``timeout_s``, ``memory_mib``, ``verifiers``, ``tools``, code.
    """
    connection, timeout_s = socket.socket(fileno=descriptor), settings["timeout_s"]
    verifiers = resolve_verifiers(settings["verifiers"], CodeRewardConfig(**settings["code"]), timeout_s)
    tools = resolve_tools(settings["tools"])
    _limit_memory(settings["memory_mib"] << 20)
    send(connection, "ready")  # imports do not count against the first answer's time
    while True:
        try:
            request = receive(connection)
        except EOFError:
            return
        # If the scorer is no longer there to kill a verifier that hangs, the alarm does.
        signal.alarm(math.ceil(timeout_s) + 1)
        prompt = Prompt(**{**request["prompt"], "token_ids": ()})
        text = request["response_text"]
        reply = _call(tools, prompt, text) if request["is_call"] else _judge(verifiers, prompt, text)
        signal.alarm(0)
        send(connection, {"id": request["id"], **reply})


def _judge(verifiers: Mapping[str, Verifier], prompt: Prompt, text: str) -> dict[str, Any]:
    """A verifier's bug must cost one answer, not the run; the scorer counts and shows it."""
    try:
        verdict = verifiers[prompt.task](prompt, text)
        if not math.isfinite(verdict.reward):
            raise ValueError(f"the verifier gave the reward {verdict.reward}")
        return {"reward": float(verdict.reward), "verdict": verdict.verdict}
    except Exception as error:
        return {"reward": -1.0, "verdict": f"error: {type(error).__name__}: {error}"}


def _call(tools: Mapping[str, Tool], prompt: Prompt, text: str) -> dict[str, Any]:
    """A tool's bug costs what it would have written."""
    try:
        observation = tools[prompt.task](prompt, text)
        if not isinstance(observation, str):
            raise TypeError(f"the tool gave {type(observation).__name__}, not text")
        return {"observation": observation[:MAX_OBSERVATION], "problem": ""}
    except Exception as error:
        return {"observation": "", "problem": f"error: {type(error).__name__}: {error}"}


def _limit_memory(num_bytes: int) -> None:
    """Let this process allocate so much on top of what it has: an allocation beyond it fails, here and nowhere else.

    The limit on data, not on addresses: libraries reserve large ranges of addresses that they never write to. A soft
    one: a sandbox, which this process starts, sets limits for its programs.
    """
    with open("/proc/self/statm", encoding="ascii") as file:
        data_pages = int(file.read().split()[5])
    limit, hard = data_pages * resource.getpagesize() + num_bytes, resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(sys.argv[2]))
