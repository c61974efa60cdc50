"""Which engines can be used now: those that are published, answer, and hold the wanted policy version."""

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from megatron_vcppo.rollout import engine_http, rendezvous
from megatron_vcppo.rollout.rendezvous import Engine

PROBE_TIMEOUT_S = 10.0
POLL_S = 1.0


@dataclass
class Member:
    """One process of an engine as a client sees it."""

    engine: Engine
    usable: bool = False
    last_answer: float = field(default_factory=time.monotonic)
    trouble: str = "not asked yet"
    requests_in_flight: int = 0
    tokens_in_flight: int = 0
    calls: set[asyncio.Task] = field(default_factory=set)

    def take_out(self, trouble: str) -> None:
        """Stop using it until it answers again; its calls end, which gives their requests to others."""
        self.usable, self.trouble = False, trouble
        for call in self.calls - {asyncio.current_task()}:
            call.cancel()


class Fleet:
    """Asks every published engine for its status, again and again, and keeps the list of usable ones."""

    def __init__(
        self,
        folder: Path,
        session: engine_http.Session,
        policy_version: int,
        health_timeout_s: float,
        across_pushes: bool = False,
    ) -> None:
        """across_pushes: an engine that takes weights, or holds others, gets no requests but keeps those it has."""
        self.folder, self.session, self.policy_version = folder, session, policy_version
        self.health_timeout_s, self.across_pushes = health_timeout_s, across_pushes
        self.members: dict[tuple[str, int, int], Member] = {}
        self.changed = asyncio.Event()
        """Set whenever an engine became usable or unusable."""
        self.look_now = asyncio.Event()
        self.last_usable = time.monotonic()

    @property
    def usable(self) -> list[Member]:
        """The members that may get requests now."""
        return [member for member in self.members.values() if member.usable]

    async def watch(self) -> None:
        """Runs until cancelled."""
        while True:
            self.look_now.clear()
            await self.look()
            with suppress(TimeoutError):
                await asyncio.wait_for(self.look_now.wait(), POLL_S)

    async def look(self) -> None:
        """One round of questions."""
        published = {
            (engine.name, engine.incarnation, engine.pid): engine for engine in rendezvous.engines(self.folder)
        }
        for key in [key for key in self.members if key not in published]:
            self.members.pop(key).take_out("withdrawn by its supervisor")
            self.changed.set()
        for key, engine in published.items():
            self.members.setdefault(key, Member(engine))
        await asyncio.gather(*(self._ask(member) for member in list(self.members.values())))
        if self.usable:
            self.last_usable = time.monotonic()

    async def _ask(self, member: Member) -> None:
        was_usable = member.usable
        try:
            status = await engine_http.status(self.session, member.engine, min(PROBE_TIMEOUT_S, self.health_timeout_s))
        except engine_http.FAILURES as error:
            member.trouble = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            silent_s = time.monotonic() - member.last_answer
            if (was_usable or member.calls) and silent_s > self.health_timeout_s:
                member.take_out(f"no answer for {silent_s:.0f} s ({member.trouble})")
        else:
            member.last_answer = time.monotonic()
            member.usable = status.state == "serving" and status.policy_version == self.policy_version
            member.trouble = f"{status.state}, policy version {status.policy_version}"
            keeps_calls = self.across_pushes and status.state in ("serving", "syncing")
            if (was_usable or member.calls) and not member.usable and not keeps_calls:
                member.take_out(member.trouble)
        if member.usable != was_usable:
            self.changed.set()

    def describe(self) -> str:
        """One line: every engine and its trouble."""
        if not self.members:
            return f"no engine is published in {self.folder}"
        return "; ".join(f"{member.engine}: {member.trouble}" for member in self.members.values())
