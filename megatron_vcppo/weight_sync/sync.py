"""The push: every trainer rank calls it together, every engine ends with the same new weights, or an error says why.

The driver tells the engines over HTTP to pause and receive; the senders of all pipeline stages then send at once, each
its part of its stage's layers; the engines drop stale caches, continue, and answer the driver's call.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megatron_vcppo.config import WeightSyncConfig
from megatron_vcppo.errors import Stopped
from megatron_vcppo.mcore.rank_messages import RankGroup
from megatron_vcppo.rollout import engine_http, rendezvous
from megatron_vcppo.rollout.messages import GroupAddress, SyncReport, SyncRequest
from megatron_vcppo.rollout.rendezvous import SECRET, Engine
from megatron_vcppo.run.secret import read_secret
from megatron_vcppo.weight_sync.push_plan import MeetingPoint, SyncRole, Target, streams_of
from megatron_vcppo.weight_sync.transport import Tensors, Transport

log = logging.getLogger(__name__)

Source = Callable[[], Tensors]
"""Starts a pass over this stage's weights: (Hugging Face name, tensor); collective over the tensor-parallel ranks."""

STATUS_TIMEOUT_S = 10.0
POLL_S = 0.5
ATTEMPTS = 3


class WeightSyncError(RuntimeError):
    """A push failed; the message names the engines or ranks at fault, and ``lost`` holds those engines."""

    def __init__(self, message: str, lost: list[Engine]) -> None:
        super().__init__(message)
        self.lost = lost


@dataclass(frozen=True)
class PushResult:
    """What a push did, the same on every rank."""

    policy_version: int
    engines: tuple[Engine, ...]
    num_bytes: int
    seconds: float
    pause_s: float
    """How long generation stood still, at the engine where it was longest."""


class WeightSync:
    """One trainer rank's part in all pushes of a stage."""

    def __init__(
        self, config: WeightSyncConfig, folder: Path, role: SyncRole, ranks: RankGroup, transport: Transport
    ) -> None:
        self.config, self.folder, self.role, self.ranks = config, folder, role, ranks
        self.transport = transport
        self.pool = ThreadPoolExecutor(1, "weight_sync")
        self.held_version: int | None = None
        """The weights that engines can still fetch, without a pass over the model."""

    def wait_for_engines(
        self, count: int, timeout_s: float, stop_requested: Callable[[], bool] = lambda: False
    ) -> list[Target]:
        """The engines that answer, once there are count; raises WeightSyncError on every rank after timeout_s.

        Raises Stopped on every rank if any was asked to stop meanwhile.
        """
        deadline = time.monotonic() + timeout_s
        while len(ready := self.answering()) < count:
            late, stops = self.ranks.any(time.monotonic() > deadline, stop_requested())
            if stops:
                raise Stopped
            if late:
                raise WeightSyncError(
                    f"{len(ready)} of {count} engines ready after {timeout_s:g} s; see their logs in {self.folder}", []
                )
            time.sleep(POLL_S)
        return ready

    def sync(self, policy_version: int, source: Source) -> PushResult:
        """Push to every engine that answers, again to those that are left if some are lost on the way.

        Raises WeightSyncError on every rank after ATTEMPTS failures, or if no engine answers for config.timeout_s.
        """
        attempt = 1
        while True:
            try:
                targets = self.wait_for_engines(1, self.config.timeout_s)
                # What was stored before the failure is not read from the model again, which may have left by now.
                return self.push(policy_version, source, targets, again=attempt > 1)
            except WeightSyncError as error:
                if attempt == ATTEMPTS or not error.lost:
                    raise
                log.warning("%s; pushing again to the engines that are left", error)
                attempt += 1

    def update_joiners(self, policy_version: int, source: Source) -> PushResult | None:
        """Push to the engines that answer with another version (restarted ones); None if there are none."""
        joiners = self.answering(but=policy_version)
        return self.push(policy_version, source, joiners, again=True) if joiners else None

    def answering(self, but: int | None = None) -> list[Target]:
        """The engines that answer now, as the driver sees them; ``but``: without those that hold this version."""
        return self.ranks.tell(asyncio.run(self._ask(but)) if self.role.is_driver else None, list[Target])

    async def _ask(self, but: int | None) -> list[Target]:
        async def ask(engine: Engine) -> Target | None:
            try:
                status = await engine_http.status(session, engine, STATUS_TIMEOUT_S)
            except engine_http.FAILURES as error:
                log.info("%s does not answer (%s)", engine, type(error).__name__)
                return None
            if status.state in ("syncing", "turning") or status.policy_version == but:
                return None  # still in a push, or a turn, that was given up; or current
            return Target(engine, status.num_workers)

        known = rendezvous.engines(self.folder)
        if not known:  # nor is there a secret, before the first supervisor has started
            return []
        async with engine_http.open_session(read_secret(self.folder / SECRET)) as session:
            answers = await asyncio.gather(*(ask(engine) for engine in known))
        return [target for target in answers if target is not None]

    def push(self, policy_version: int, source: Source, targets: list[Target], again: bool = False) -> PushResult:
        """One attempt. Raises WeightSyncError on every rank, at the latest config.timeout_s after the start.

        again: these weights were pushed before; where they are stored, they are not sent once more.
        """
        if not targets:
            raise WeightSyncError(f"no engine in {self.folder} answers: nothing to push to", [])
        started = time.monotonic()
        points = self._meet(targets)
        errors: list[str] = []
        reports: Future[dict[Engine, SyncReport]] | None = None
        if self.role.is_driver and self.transport.live:
            reports = self.pool.submit(asyncio.run, self._tell(policy_version, targets, points))
        if again and self.held_version == policy_version:
            num_bytes = 0
        else:
            errors, num_bytes = self._send_all(policy_version, source, targets)
            self.held_version = policy_version if not self.transport.live and not errors else None
        if self.role.is_driver and not self.transport.live and not errors:
            reports = self.pool.submit(asyncio.run, self._tell(policy_version, targets, []))
        mine = ([*reports.result().items()], time.monotonic() - started) if reports else ([], 0.0)
        answers, seconds = self.ranks.tell(mine, tuple[list[tuple[Engine, SyncReport]], float])
        told = dict(answers)
        failed = {engine: report for engine, report in told.items() if report.error}
        if errors or failed:
            self.transport.close()
            raise _failure(policy_version, errors, failed)
        pause_s = max(report.pause_s for report in told.values())
        return PushResult(policy_version, tuple(t.engine for t in targets), num_bytes, seconds, pause_s)

    def _meet(self, targets: list[Target]) -> list[MeetingPoint]:
        """Where the senders are met; empty if the weights pass through a folder."""
        role, mine = self.role, None
        if role.sender is not None:
            mine = MeetingPoint(role.pp_rank, role.sender, *self.transport.meet(targets))
        if not self.transport.live:
            return []
        place = role.pp_rank * role.num_senders + (role.sender or 0)
        return self.ranks.table(mine, place, role.pp_size * role.num_senders, MeetingPoint)

    def _send_all(self, policy_version: int, source: Source, targets: list[Target]) -> tuple[list[str], int]:
        """All stages at once; returns what went wrong on which rank and the bytes of all senders."""
        error, sent = "", 0
        if self.role.is_sender:
            try:
                self.transport.connect(targets)
            except Exception as problem:
                error = f"connecting: {problem}"
        errors = self.ranks.texts(error)
        if not errors:
            if self.role.takes_part:
                error, sent = self._send(policy_version, source)
            errors = self.ranks.texts(error)
        return [f"trainer rank {rank}: {text}" for rank, text in errors], self.ranks.sum(sent)

    def _send(self, policy_version: int, source: Source) -> tuple[str, int]:
        tensors = source()
        try:
            if self.role.is_sender:
                return "", self.transport.send(tensors, policy_version)
        except Exception as problem:
            log.warning("sending policy version %d failed", policy_version, exc_info=True)
            self.transport.close()  # the engines notice at once
            return f"sending: {problem}", 0
        finally:
            for _ in tensors:  # tensor-parallel ranks gather together: after a failure, too, all of them go to the end
                pass
        return "", 0

    async def _tell(
        self, policy_version: int, targets: list[Target], points: list[MeetingPoint]
    ) -> dict[Engine, SyncReport]:
        """Tell every engine to receive; its report, or a report of why there is none."""
        streams = streams_of(targets, points)

        async def tell(target: Target, mine: list[list[GroupAddress]]) -> SyncReport:
            request = SyncRequest(
                policy_version=policy_version,
                pause=self.config.pause,
                timeout_s=self.config.timeout_s,
                backend=self.transport.backend,
                streams=mine,
                folder=self.transport.folder(policy_version, target.engine.node),
                address=target.engine.address,
            )
            try:
                return await engine_http.sync(session, target.engine, request)
            except engine_http.FAILURES as error:
                return SyncReport(error=f"lost: {type(error).__name__} {error}".strip(), lost=True)

        async with engine_http.open_session(read_secret(self.folder / SECRET)) as session:
            answers = await asyncio.gather(*(tell(target, mine) for target, mine in zip(targets, streams, strict=True)))
        return {target.engine: answer for target, answer in zip(targets, answers, strict=True)}


def _failure(policy_version: int, errors: list[str], failed: dict[Engine, SyncReport]) -> WeightSyncError:
    """The engines that vanished are the cause if there are any; the others only noticed."""
    lost = [engine for engine, report in failed.items() if report.lost]
    blamed = {engine: report for engine, report in failed.items() if report.lost} or failed
    causes = [f"{engine}: {report.error}" for engine, report in blamed.items()] or errors
    return WeightSyncError(f"pushing policy version {policy_version} failed: {'; '.join(causes)}", lost)
