"""Pushes to engines that sleep while the trainer has their GPUs: woken part by part around a push, asleep after it.

    trainer's turn ── weights wake ── push ── (trainer's weights leave) ── cache wakes ── generation ── sleep ── …

An engine joins asleep: one that was restarted is woken by the push that makes it current.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from typing_extensions import override

from megatron_vcppo.config import WeightSyncConfig
from megatron_vcppo.mcore.rank_messages import RankGroup
from megatron_vcppo.rollout import engine_http, rendezvous
from megatron_vcppo.rollout.messages import CACHE, WEIGHTS, SleepRequest, WakeRequest
from megatron_vcppo.rollout.rendezvous import SECRET, Engine
from megatron_vcppo.run.secret import read_secret
from megatron_vcppo.weight_sync.push_plan import SyncRole, Target
from megatron_vcppo.weight_sync.sync import POLL_S, PushResult, Source, WeightSync, WeightSyncError
from megatron_vcppo.weight_sync.transport import Transport

TURN_TIMEOUT_S = 60.0
"""What an engine may take to sleep or wake; more is a hung engine, which its supervisor starts again."""


class SleepingSync(WeightSync):
    """``WeightSync`` whose engines are awake from a push to ``put_to_sleep``."""

    def __init__(
        self, config: WeightSyncConfig, folder: Path, role: SyncRole, ranks: RankGroup, transport: Transport
    ) -> None:
        super().__init__(config, folder, role, ranks, transport)
        self.after_push: Callable[[], None] = lambda: None
        """Called on every rank when engines have their weights and before they take their cache."""
        self.turn_timeout_s = min(TURN_TIMEOUT_S, config.timeout_s)

    @override
    def push(self, policy_version: int, source: Source, targets: list[Target], again: bool = False) -> PushResult:
        self.wake(targets, WEIGHTS)
        result = super().push(policy_version, source, targets, again)
        self.after_push()
        self.wake(targets, CACHE)
        return result

    def wake(self, targets: Sequence[Target], part: str) -> None:
        """Let these engines take a part of their GPU memory; raises WeightSyncError naming those that did not."""
        failed = self._turn([target.engine for target in targets], WakeRequest([part], self.turn_timeout_s))
        if failed:
            raise WeightSyncError(f"waking the engines' {part} failed: {_causes(failed)}", list(failed))

    def put_to_sleep(self, level: int) -> None:
        """Until every published engine is asleep, or is published no more.

        Raises WeightSyncError on every rank after config.timeout_s, naming those that are awake: a dead engine is
        withdrawn in seconds, a hung one after rollout.health_timeout_s.
        """
        deadline = time.monotonic() + self.config.timeout_s
        request = SleepRequest(level, self.turn_timeout_s)
        while awake := self._turn(rendezvous.engines(self.folder) if self.role.is_driver else [], request):
            if self.ranks.any(time.monotonic() > deadline)[0]:
                raise WeightSyncError(
                    f"engines are not asleep after {self.config.timeout_s:g} s: {_causes(awake)}", list(awake)
                )
            time.sleep(POLL_S)

    def _turn(self, engines: Sequence[Engine], request: SleepRequest | WakeRequest) -> dict[Engine, str]:
        """The engines that did not do it, and why; the same on every rank."""
        mine = asyncio.run(self._ask_turn(engines, request)) if self.role.is_driver and engines else {}
        return dict(self.ranks.tell([*mine.items()], list[tuple[Engine, str]]))

    async def _ask_turn(self, engines: Sequence[Engine], request: SleepRequest | WakeRequest) -> dict[Engine, str]:
        async def ask(engine: Engine) -> str:
            try:
                return (await engine_http.turn(session, engine, request)).error
            except engine_http.FAILURES as error:
                return f"{type(error).__name__} {error}".strip()

        async with engine_http.open_session(read_secret(self.folder / SECRET)) as session:
            errors = await asyncio.gather(*(ask(engine) for engine in engines))
        return {engine: error for engine, error in zip(engines, errors, strict=True) if error}


def _causes(failed: dict[Engine, str]) -> str:
    return "; ".join(f"{engine}: {error}" for engine, error in failed.items())
