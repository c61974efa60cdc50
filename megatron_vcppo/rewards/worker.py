"""A process that runs verifiers for the scorer: one JSON request, one JSON reply, over a socket.

A process of its own, because a verifier may hang, leak, or die, and is then killed without harm to the run.
"""

import json
import math
import signal
import sys
from multiprocessing.connection import Connection

from megatron_vcppo.records import Prompt
from megatron_vcppo.rewards.registry import resolve_verifiers


def main(descriptor: int, timeout_s: float, extra: dict[str, str]) -> None:
    """Serve until the other side closes the socket."""
    connection: Connection = Connection(descriptor)
    verifiers = resolve_verifiers(extra)
    connection.send_bytes(b"{}")  # ready: imports do not count against the first answer's time
    while True:
        try:
            request = json.loads(connection.recv_bytes())
        except EOFError:
            return
        # If the scorer is no longer there to kill a verifier that hangs, the alarm does.
        signal.alarm(math.ceil(timeout_s) + 1)
        prompt = Prompt(**{**request["prompt"], "token_ids": ()})
        try:
            verdict = verifiers[prompt.task](prompt, request["response_text"])
            if not math.isfinite(verdict.reward):
                raise ValueError(f"the verifier gave the reward {verdict.reward}")
            reply = {"reward": float(verdict.reward), "verdict": verdict.verdict}
        except Exception as error:  # a verifier's bug must cost one answer, not the run; the scorer counts and shows it
            reply = {"reward": -1.0, "verdict": f"error: {type(error).__name__}: {error}"[:500]}
        signal.alarm(0)
        connection.send_bytes(json.dumps(reply).encode())


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), json.loads(sys.argv[3]))
