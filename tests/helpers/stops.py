"""Stop requests at a moment that a test chooses, in the process of a rank."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from typing import Any

from megatron_vcppo.rollout import engine_http


def ask_to_stop(rank: int = 0) -> None:
    """As Slurm or the controller does, on one rank: the others must follow."""
    if os.environ["RANK"] == str(rank):
        os.kill(os.getpid(), signal.SIGUSR2)


def hold_responses(after: int, then: Callable[[], None] = lambda: None) -> Callable[[], bool]:
    """In this process: engines stop answering after a number of responses. Returns whether they have come to that."""
    generate, seen, held = engine_http.generate, 0, False

    async def answer(*arguments: Any) -> AsyncIterator[Any]:
        nonlocal seen, held
        async for response in generate(*arguments):
            if seen >= after:
                held = True
                then()
                await asyncio.sleep(3600)
            seen += 1
            yield response

    engine_http.generate = answer  # type: ignore[assignment]
    return lambda: held


def at_call(owner: Any, name: str, number: int, do: Callable[[], None]) -> None:
    """In this process: do something at the beginning of the n-th call of a function."""
    function, calls = getattr(owner, name), 0

    def counted(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            do()
        return function(*arguments, **keywords)

    setattr(owner, name, counted)
