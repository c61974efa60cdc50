"""Scores rollouts as they arrive, and runs the tools that responses call: in worker processes, within a time limit."""

import contextlib
import itertools
import json
import math
import os
import queue
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_vcppo.config import CodeRewardConfig
from megatron_vcppo.records import Prompt, Rollout
from megatron_vcppo.rewards.registry import resolve_verifiers
from megatron_vcppo.rewards.tools import MAX_OBSERVATION, resolve_tools
from megatron_vcppo.rewards.verifier import Verdict
from megatron_vcppo.rewards.worker_messages import BrokenMessage, receive, send

_DYING_S = 5.0
_START_S = 60.0  # a worker imports verifiers; a user's own may import a lot
_MAX_REPLY = 1 << 20
_LONGEST_VERDICT = 500
_SHOWN = 20
_TRUNCATED = Verdict(-1.0, "truncated")


class Scorer:
    """A pool of verifier processes. Use as a context manager, or call ``close``.

    A verifier that raises costs its answer ("error: …"), one that hangs or dies costs its answer and its process
    ("timeout", "error: …"), which is started again. All are counted and kept for ``take_problems``.
    A tool that fails in these ways writes nothing. Calls of tools come first, because engines wait for them.
    A response cut at the token limit is wrong ("truncated") whatever it says: it never ended its episode.
    """

    def __init__(
        self,
        num_workers: int = 2,
        timeout_s: float = 10.0,
        verifiers: Mapping[str, str] | None = None,
        code: CodeRewardConfig | None = None,
        memory_mib: int = 2048,
        tools: Mapping[str, str] | None = None,
    ) -> None:
        """timeout_s: for one answer or call. verifiers, tools: as in ``resolve_verifiers`` and ``resolve_tools``, whose
        UserError it raises at once.

        memory_mib: what a worker may allocate on top of what it has when it starts.
        """
        code = code or CodeRewardConfig()
        self.tasks = frozenset(resolve_verifiers(verifiers or {}, code))
        """Tasks that can be judged."""
        self.tool_stops = {task: tool.stop for task, tool in resolve_tools(tools or {}).items()}
        """By task that has a tool: the text that ends a call."""
        self._timeout_s = timeout_s
        self._settings = {
            "timeout_s": timeout_s,
            "memory_mib": memory_mib,
            "verifiers": dict(verifiers or {}),
            "code": asdict(code),
            "tools": dict(tools or {}),
        }
        self._queue: queue.PriorityQueue[tuple[int, int, _Work | None]] = queue.PriorityQueue()
        self._order = itertools.count()
        self._lock = threading.Lock()
        self._problems: list[str] = []
        self._threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(num_workers)]
        for thread in self._threads:
            thread.start()

    def submit(self, rollout: Rollout) -> "Future[Rollout]":
        """Score one rollout in the background; the result has ``reward`` and ``verdict``. Safe from any thread."""
        assert rollout.prompt.task in self.tasks, f"no verifier for task {rollout.prompt.task!r}"
        future: Future[Rollout] = Future()
        if rollout.truncated:
            self._finish(rollout, future, _TRUNCATED)
        else:
            self._put(_SCORE, _Judgment(rollout, future))
        return future

    def call_tool(self, prompt: Prompt, text: str) -> "Future[str]":
        """What the tool of the prompt's task writes behind ``text``, the response so far. Safe from any thread."""
        future: Future[str] = Future()
        self._put(_CALL, _ToolCall(prompt, text, future))
        return future

    def _put(self, rank: int, work: "_Work | None") -> None:
        self._queue.put((rank, next(self._order), work))

    def score(self, rollouts: Iterable[Rollout]) -> list[Rollout]:
        """Score rollouts while they arrive; returns all, in the order in which they arrived."""
        return [future.result() for future in [self.submit(rollout) for rollout in rollouts]]

    def take_problems(self) -> list[str]:
        """The first twenty timeouts and errors since the last call, one line each, to be shown."""
        with self._lock:
            problems, self._problems = self._problems, []
        return problems

    def close(self, finish: bool = True) -> None:
        """End the workers; first finish what was submitted, or, without ``finish``, only what they are at."""
        while not finish and not self._queue.empty():
            with contextlib.suppress(queue.Empty):
                work = self._queue.get_nowait()[2]
                if work is not None:
                    work.future.cancel()
        for _ in self._threads:
            self._put(_END, None)
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> "Scorer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(finish=kind is None)

    def _serve(self) -> None:
        """One thread per worker process: it waits for the answer so that nothing else has to."""
        worker: _Worker | None = None
        while (work := self._queue.get()[2]) is not None:
            if not work.future.set_running_or_notify_cancel():
                continue
            failure = ""
            try:
                worker = worker or _Worker(self._settings)
                reply = worker.ask(work, self._timeout_s)
            except BaseException as error:
                if worker:
                    worker.kill()
                worker = None
                if not isinstance(error, _WorkerLost):
                    work.future.set_exception(error)
                    continue
                failure = str(error)
            if isinstance(work, _Judgment):
                verdict = Verdict(-1.0, failure) if failure else Verdict(reply["reward"], reply["verdict"])
                self._finish(work.rollout, work.future, verdict)
            else:
                self._note(work.prompt, "tool: " + failure if failure else reply["problem"])
                work.future.set_result("" if failure else reply["observation"])
        if worker:
            worker.kill()

    def _finish(self, rollout: Rollout, future: "Future[Rollout]", verdict: Verdict) -> None:
        self._note(rollout.prompt, verdict.verdict if verdict.kind in ("timeout", "error") else "")
        future.set_result(replace(rollout, reward=verdict.reward, verdict=verdict.verdict))

    def _note(self, prompt: Prompt, problem: str) -> None:
        with self._lock:
            if problem and len(self._problems) < _SHOWN:
                self._problems.append(f"{prompt.prompt_id} (task {prompt.task}): {problem}")


@dataclass(frozen=True)
class _Judgment:
    rollout: Rollout
    future: "Future[Rollout]"


@dataclass(frozen=True)
class _ToolCall:
    prompt: Prompt
    text: str
    future: "Future[str]"


_Work = _Judgment | _ToolCall
_CALL, _SCORE, _END = range(3)
"""What comes first."""


class _WorkerLost(Exception):
    """The worker hangs or is gone; the message is the verdict."""


class _Worker:
    """One verifier process. It gets no secret: its environment is a new one, and it leads its own process group."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        ours, theirs = socket.socketpair()
        # Verifiers of the user's own are imported from where this process would import them.
        path = os.pathsep.join([str(Path(__file__).parents[2]), *(entry or os.getcwd() for entry in sys.path)])
        arguments = [str(theirs.fileno()), json.dumps(settings)]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "megatron_vcppo.rewards.worker", *arguments],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={"PATH": os.environ.get("PATH", os.defpath), "PYTHONPATH": path, "LANG": "C.UTF-8"},
                start_new_session=True,
            )
        self._connection = ours
        try:
            self._receive(_START_S, "error: the verifier process did not start")
        except _WorkerLost:
            self.kill()
            raise

    def ask(self, work: _Work, timeout_s: float) -> dict[str, Any]:
        """reward and verdict, or observation and problem.

        Raises _WorkerLost if the answer does not come in time, is not one to this request, or the process dies.
        """
        if isinstance(work, _ToolCall):
            prompt, text, check = work.prompt, work.text, _checked_call
        else:
            prompt, text, check = work.rollout.prompt, work.rollout.response_text, _checked
        # Without it one message too many would shift every later verdict by one answer.
        request_id = secrets.token_hex(8)
        request = {
            "id": request_id,
            "is_call": isinstance(work, _ToolCall),
            "prompt": {**asdict(prompt), "token_ids": []},
            "response_text": text,
        }
        try:
            send(self._connection, request, timeout_s)
        except OSError as error:
            raise _WorkerLost(f"error: the verifier process is gone ({error})") from error
        reply = self._receive(timeout_s, f"timeout: {timeout_s:g} s")
        return check(reply, request_id)

    def kill(self) -> None:
        """End the process and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._connection.close()

    def _receive(self, timeout_s: float, on_timeout: str) -> Any:
        try:
            return receive(self._connection, timeout_s, _MAX_REPLY)
        except TimeoutError as error:
            raise _WorkerLost(on_timeout) from error
        except BrokenMessage as error:
            raise _WorkerLost(f"error: the verifier process sent {error}") from error
        except (EOFError, OSError) as error:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_DYING_S)
            raise _WorkerLost(f"error: the verifier process died (exit code {self._process.poll()})") from error


def _checked(reply: Any, request_id: str) -> dict[str, Any]:
    """A reply as reward and verdict. Raises _WorkerLost if it is none, or not to this request."""
    reward, verdict = (reply.get("reward"), reply.get("verdict")) if isinstance(reply, dict) else (None, None)
    if not isinstance(reward, float) or not math.isfinite(reward) or not isinstance(verdict, str):
        raise _WorkerLost("error: the verifier process sent a reply that is no verdict")
    if reply.get("id") != request_id:
        raise _WorkerLost("error: the verifier process sent a reply to another request")
    return {"reward": reward, "verdict": _shown(verdict)}


def _checked_call(reply: Any, request_id: str) -> dict[str, Any]:
    """A reply as what a tool wrote, and what went wrong with it. Raises _WorkerLost as ``_checked``."""
    text, problem = (reply.get("observation"), reply.get("problem")) if isinstance(reply, dict) else (None, None)
    if not isinstance(text, str) or not isinstance(problem, str):
        raise _WorkerLost("error: the verifier process sent a reply that is no tool's")
    if reply.get("id") != request_id:
        raise _WorkerLost("error: the verifier process sent a reply to another request")
    return {"observation": text[:MAX_OBSERVATION], "problem": _shown(f"tool: {problem}" if problem else "")}


def _shown(text: str) -> str:
    """A verdict may quote what a program wrote; it is shown in terminals and reports."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text[:_LONGEST_VERDICT])
