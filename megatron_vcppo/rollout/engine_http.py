"""The HTTP connection from a client to one engine."""

from collections.abc import AsyncIterator

import aiohttp
import msgspec

from megatron_vcppo.rollout.auth import bearer
from megatron_vcppo.rollout.messages import (
    GENERATE,
    SLEEP,
    STATUS,
    SYNC,
    WAKE,
    GenerateBatch,
    Response,
    SleepRequest,
    Status,
    SyncReport,
    SyncRequest,
    TurnReport,
    WakeRequest,
)
from megatron_vcppo.rollout.rendezvous import Engine

LONGEST_LINE_BYTES = 64 * 2**20
CONNECT_TIMEOUT_S = 10.0
FAILURES = (aiohttp.ClientError, TimeoutError, OSError, msgspec.DecodeError)
"""What a dead, hung or broken engine looks like from here."""


def open_session(secret: str) -> aiohttp.ClientSession:
    """A session for all engines; it must be closed by its maker."""
    connector = aiohttp.TCPConnector(limit=0)
    return aiohttp.ClientSession(
        headers=bearer(secret), connector=connector, read_bufsize=LONGEST_LINE_BYTES, trust_env=False
    )


async def generate(
    session: aiohttp.ClientSession, engine: Engine, batch: GenerateBatch, timeout_s: float
) -> AsyncIterator[Response]:
    """Responses in the order they finish. Raises one of FAILURES if the engine fails or the deadline passes."""
    timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_TIMEOUT_S)
    async with session.post(engine.url + GENERATE, data=msgspec.json.encode(batch), timeout=timeout) as reply:
        reply.raise_for_status()
        async for line in reply.content:
            yield msgspec.json.decode(line, type=Response)


async def status(session: aiohttp.ClientSession, engine: Engine, timeout_s: float) -> Status:
    """The state of the engine. Raises one of FAILURES."""
    async with session.get(engine.url + STATUS, timeout=aiohttp.ClientTimeout(total=timeout_s)) as reply:
        reply.raise_for_status()
        return msgspec.json.decode(await reply.read(), type=Status)


async def sync(session: aiohttp.ClientSession, engine: Engine, request: SyncRequest) -> SyncReport:
    """Let the engine take part in a push; returns when it is done. Raises one of FAILURES."""
    timeout = aiohttp.ClientTimeout(total=request.timeout_s + 10, sock_connect=CONNECT_TIMEOUT_S)
    async with session.post(engine.url + SYNC, data=msgspec.json.encode(request), timeout=timeout) as reply:
        reply.raise_for_status()
        return msgspec.json.decode(await reply.read(), type=SyncReport)


async def turn(session: aiohttp.ClientSession, engine: Engine, request: SleepRequest | WakeRequest) -> TurnReport:
    """Let the engine sleep or wake; returns when it has. Raises one of FAILURES."""
    route = SLEEP if isinstance(request, SleepRequest) else WAKE
    timeout = aiohttp.ClientTimeout(total=request.timeout_s + 10, sock_connect=CONNECT_TIMEOUT_S)
    async with session.post(engine.url + route, data=msgspec.json.encode(request), timeout=timeout) as reply:
        reply.raise_for_status()
        return msgspec.json.decode(await reply.read(), type=TurnReport)
