"""The HTTP connection from a client to one engine."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec

from megatron_vcppo.rollout.auth import PROOF_HEADER, Call, digest_of
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


class Session:
    """Connections to all engines; ``async with`` ends them."""

    def __init__(self, secret: str) -> None:
        self.secret = secret
        connector = aiohttp.TCPConnector(limit=0)
        self.http = aiohttp.ClientSession(connector=connector, read_bufsize=LONGEST_LINE_BYTES, trust_env=False)

    async def __aenter__(self) -> "Session":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.close()

    @asynccontextmanager
    async def ask(
        self, engine: Engine, method: str, path: str, body: Any, timeout: aiohttp.ClientTimeout
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The engine's reply, which has proved that it holds the run's secret. Raises one of FAILURES."""
        data = b"" if body is None else msgspec.json.encode(body)
        call = Call(method, path, engine.place, digest_of(data))
        headers = call.headers(self.secret) | {"Content-Type": "application/json"}
        # A stranger's redirect is not followed: it would have this process call what he likes.
        options: dict[str, Any] = {"headers": headers, "timeout": timeout, "allow_redirects": False}
        async with self.http.request(method, engine.url + path, data=data or None, **options) as reply:
            if not call.is_proved(self.secret, reply.headers.get(PROOF_HEADER, "")):
                raise aiohttp.ClientError(f"what answers at {engine} does not hold the run's secret")
            reply.raise_for_status()
            yield reply


def open_session(secret: str) -> Session:
    """A session for all engines; it must be closed by its maker."""
    return Session(secret)


async def generate(session: Session, engine: Engine, batch: GenerateBatch, timeout_s: float) -> AsyncIterator[Response]:
    """Responses in the order they finish. Raises one of FAILURES if the engine fails or the deadline passes."""
    timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_TIMEOUT_S)
    async with session.ask(engine, "POST", GENERATE, batch, timeout) as reply:
        async for line in reply.content:
            yield msgspec.json.decode(line, type=Response)


async def status(session: Session, engine: Engine, timeout_s: float) -> Status:
    """The state of the engine. Raises one of FAILURES."""
    async with session.ask(engine, "GET", STATUS, None, aiohttp.ClientTimeout(total=timeout_s)) as reply:
        return msgspec.json.decode(await reply.read(), type=Status)


async def sync(session: Session, engine: Engine, request: SyncRequest) -> SyncReport:
    """Let the engine take part in a push; returns when it is done. Raises one of FAILURES."""
    timeout = aiohttp.ClientTimeout(total=request.timeout_s + 10, sock_connect=CONNECT_TIMEOUT_S)
    async with session.ask(engine, "POST", SYNC, request, timeout) as reply:
        return msgspec.json.decode(await reply.read(), type=SyncReport)


async def turn(session: Session, engine: Engine, request: SleepRequest | WakeRequest) -> TurnReport:
    """Let the engine sleep or wake; returns when it has. Raises one of FAILURES."""
    route = SLEEP if isinstance(request, SleepRequest) else WAKE
    timeout = aiohttp.ClientTimeout(total=request.timeout_s + 10, sock_connect=CONNECT_TIMEOUT_S)
    async with session.ask(engine, "POST", route, request, timeout) as reply:
        return msgspec.json.decode(await reply.read(), type=TurnReport)
