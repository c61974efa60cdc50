"""What stands in front of vLLM's HTTP server, inside its process: the secret's check and this project's routes.

Passed to vLLM with ``--middleware``, so it sees every request first. vLLM's development routes (which run code for
whoever calls them) stay switched off: pausing and pushing weights go through the engine's own methods here.
"""

import asyncio
import itertools
import math
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest
from vllm.exceptions import VLLMClientError
from vllm.sampling_params import RequestOutputKind, SamplingParams

from megatron_vcppo.rollout.auth import PLACE_VARIABLE, PROOF_HEADER, authorized_call, digest_of
from megatron_vcppo.rollout.messages import (
    CACHE,
    CORE_IS_DEAD,
    GENERATE,
    NO_VERSION,
    PUSHES,
    SLEEP,
    STATUS,
    SYNC,
    WAKE,
    WEIGHTS,
    GenerateBatch,
    GenerateRequest,
    Response,
    Sampling,
    SleepRequest,
    Status,
    SyncReport,
    SyncRequest,
    TurnReport,
    WakeRequest,
)
from megatron_vcppo.run.secret import SECRET_FILE_VARIABLE, read_secret

RECEIVE_SHARE = 0.8
"""Of the time that a push has left after the pause: the workers' deadline, so that one whose worker hangs is told from
those that waited in vain for what it held up."""
CORE_DEADLINE_S = 5.0
"""How long the engine's core may take to answer between two steps before the status route calls it hung."""


class Middleware:
    """ASGI middleware. Unauthorised requests get 401 and reach nothing, whatever their route."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app
        self.secret = read_secret(Path(os.environ[SECRET_FILE_VARIABLE]))
        self.place = os.environ[PLACE_VARIABLE]
        self.used: set[str] = set()
        """The numbers of all requests: each is served once. A run makes a few for each of its iterations."""
        self.names = itertools.count()
        self.policy_version = NO_VERSION
        self.state = "serving"
        self.pushed: list[int] = []
        """All versions that it has held, each once in a row."""
        self.running = 0
        self.awake = {WEIGHTS, CACHE}
        """The parts of its GPU memory that it has."""
        self.stuck = ""
        """Why a change of its GPU memory failed: nobody knows what it holds then, and only a restart helps."""
        self.routes = {
            ("POST", GENERATE): self._generate,
            ("POST", SYNC): self._sync,
            ("GET", STATUS): self._status,
            ("POST", SLEEP): self._sleep,
            ("POST", WAKE): self._wake,
        }

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        """Check the secret, then serve one of our routes or hand on to vLLM."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        method, query = scope.get("method", ""), scope.get("query_string", b"").decode("ascii", "replace")
        path = scope["path"] + ("?" + query if query else "")
        call = authorized_call(scope["headers"], method, path, self.place, self.secret)
        if scope["type"] == "websocket":  # none of ours
            return await send({"type": "websocket.close", "code": 1008})
        if call is None or call.number in self.used:
            return await answer(send, 401, b'{"error":"unauthorized"}')
        self.used.add(call.number)
        body = await read_body(receive)
        if digest_of(body) != call.digest:
            return await answer(send, 401, b'{"error":"unauthorized"}')
        proof = (PROOF_HEADER.lower().encode(), call.proof(self.secret).encode())

        async def send_proved(message: dict) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), proof]}
            await send(message)

        route = self.routes.get((method, scope["path"]))
        if route is None:
            return await self.app(scope, again(body, receive), send_proved)
        await route(scope["app"].state.engine_client, body, receive, send_proved)

    async def _status(self, engine: Any, body: bytes, receive: Callable, send: Callable) -> None:
        if engine.errored:
            return await answer(send, CORE_IS_DEAD, b'{"error":"the engine core died"}')
        if self.stuck:
            return await answer(send, CORE_IS_DEAD, msgspec.json.encode({"error": self.stuck}))
        if self.state not in ("syncing", "turning"):  # then the core is busy, and what it does has its own deadline
            try:
                await asyncio.wait_for(engine.get_weight_version(), CORE_DEADLINE_S)
            except Exception as error:
                return await answer(send, 503, msgspec.json.encode({"error": f"engine core: {error!r}"}))
        num_workers = engine.vllm_config.parallel_config.world_size_across_dp
        await answer(send, 200, msgspec.json.encode(Status(self.state, self.policy_version, self.running, num_workers)))

    async def _generate(self, engine: Any, body: bytes, receive: Callable, send: Callable) -> None:
        if len(self.awake) < 2:
            return await answer(send, 409, msgspec.json.encode({"error": f"the engine is {self.state}"}))
        batch = msgspec.json.decode(body, type=GenerateBatch)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/jsonl")]})
        tasks = [asyncio.create_task(self._respond(engine, batch.sampling, request)) for request in batch.requests]
        gone = asyncio.create_task(disconnected(receive))
        self.running += len(tasks)
        try:
            async for responses in finished_groups(tasks, gone):
                lines = b"".join(msgspec.json.encode(response) + b"\n" for response in responses)
                await send({"type": "http.response.body", "body": lines, "more_body": True})
            if not gone.done():
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self.running -= len(tasks)
            for task in (*tasks, gone):
                task.cancel()

    async def _respond(self, engine: Any, sampling: Sampling, request: GenerateRequest) -> Response:
        output = None
        try:
            params = sampling_params(sampling, request)
            prompt = {"prompt_token_ids": request.token_ids}
            async for partial in engine.generate(prompt, params, f"vcppo-{next(self.names)}"):
                output = partial
        except (ValueError, VLLMClientError) as error:  # the request is at fault; anything else ends the whole answer
            return Response(request.key, error=f"{type(error).__name__}: {error}")
        assert output is not None
        choice = output.outputs[0]
        if choice.finish_reason not in ("stop", "length"):
            return Response(request.key, error=f"ended by the engine: {choice.finish_reason}")
        version, changes = versions_of(output, self.pushed)
        logprobs = choice.logprobs.logprobs
        if not all(map(math.isfinite, logprobs)):
            return Response(
                request.key,
                error=f"log-probs that are not finite: weights {version}, or ones before them, are out of range",
            )
        routed_experts = b""
        if sampling.routed_experts:
            if choice.routed_experts is None:
                return Response(request.key, error="the engine was started without --enable-return-routed-experts")
            routed_experts = choice.routed_experts.tobytes()
        return Response(
            request.key,
            list(choice.token_ids),
            logprobs,
            choice.finish_reason,
            version,
            changes,
            routed_experts,
        )

    async def _sync(self, engine: Any, body: bytes, receive: Callable, send: Callable) -> None:
        request = msgspec.json.decode(body, type=SyncRequest)
        if WEIGHTS not in self.awake:
            report = SyncReport(error=f"it is asleep: its weights must wake first (POST {WAKE})")
            return await answer(send, 200, msgspec.json.encode(report))
        self.state, self.policy_version = "syncing", NO_VERSION
        try:
            taken = take_weights(engine, request, CACHE in self.awake, self.pushed)
            report = await asyncio.wait_for(taken, request.timeout_s)
            self.state, self.policy_version = self._rested(), request.policy_version
        except TimeoutError:  # the workers' deadline is earlier: whoever passes this one hangs
            self.state = "broken"
            report = SyncReport(error=f"lost: its core did not answer within {request.timeout_s:g} s", lost=True)
        except Exception as error:
            self.state = "broken"
            report = SyncReport(error=f"{type(error).__name__}: {error}"[:1000])
        await answer(send, 200, msgspec.json.encode(report))

    async def _sleep(self, engine: Any, body: bytes, receive: Callable, send: Callable) -> None:
        request = msgspec.json.decode(body, type=SleepRequest)

        async def sleep() -> None:
            if not self.awake:
                return
            if asleep := {WEIGHTS, CACHE} - self.awake:  # vLLM cannot send the rest alone to sleep
                await engine.wake_up(sorted(asleep))
            await engine.sleep(request.level, mode="abort")
            self.awake = set()
            if request.level > 1:
                self.policy_version = NO_VERSION

        await self._turn(sleep, request.timeout_s, send)

    async def _wake(self, engine: Any, body: bytes, receive: Callable, send: Callable) -> None:
        request = msgspec.json.decode(body, type=WakeRequest)

        async def wake() -> None:
            if parts := [part for part in request.parts if part not in self.awake]:
                await engine.wake_up(parts)
                self.awake |= set(parts)

        await self._turn(wake, request.timeout_s, send)

    async def _turn(self, change: Callable[[], Awaitable[None]], timeout_s: float, send: Callable) -> None:
        """Change what the engine has of the GPU's memory, unless a change before this one failed."""
        self.state = "broken" if self.stuck else "turning"
        try:
            if not self.stuck:
                await asyncio.wait_for(change(), timeout_s)
                self.state = self._rested()
        except Exception as error:
            self.state = "broken"
            text = f"not done after {timeout_s:g} s" if isinstance(error, TimeoutError) else f"{error}"
            self.stuck = f"{type(error).__name__}: {text}"[:1000]
        report = TurnReport(self.stuck)
        await answer(send, 200, msgspec.json.encode(report))

    def _rested(self) -> str:
        """The state when nothing is under way."""
        return {0: "asleep", 1: "waking", 2: "serving"}[len(self.awake)]


async def take_weights(engine: Any, request: SyncRequest, is_awake: bool, pushed: list[int]) -> SyncReport:
    """One push as the engine sees it; adds it to ``pushed``, unless the engine held this version.

    is_awake: it has its cache, too; else it stays paused, as sleep left it.
    """
    started = time.monotonic()
    if is_awake:
        await engine.pause_generation(mode={"drain": "wait", "keep": "keep"}[request.pause], clear_cache=False)
    drained = time.monotonic()
    left_s = RECEIVE_SHARE * (request.timeout_s - (drained - started))
    update = msgspec.to_builtins(msgspec.structs.replace(request, timeout_s=left_s))
    await engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info={"request": update}))
    await engine.start_weight_update()
    await engine.update_weights(WeightTransferUpdateRequest(update_info={}))
    await engine.finish_weight_update(str(request.policy_version))
    is_new = pushed[-1:] != [request.policy_version]
    if is_new:
        pushed.append(request.policy_version)
    await engine.reset_prefix_cache(reset_running_requests=is_new and request.pause == "keep")
    if is_awake:
        await engine.resume_generation()
    return SyncReport(pause_s=time.monotonic() - drained)


def versions_of(output: Any, pushed: Sequence[int]) -> tuple[int, list[tuple[int, int]]]:
    """The policy version of a finished response's first token, and (token, version) where others follow.

    output: with the version of its last step, as the engine's core knows it, and how many tokens it had at each push
    before. pushed: the versions of all pushes so far, in order.
    """
    spans = [(span.start, int(span.version) if span.version.isdecimal() else NO_VERSION)
             for span in output.outputs[0].weight_versions or ()]  # fmt: skip
    if len(spans) > 1:  # a response with stop strings comes token by token
        return spans[0][1], spans[1:]
    if not spans or spans[0][1] == NO_VERSION:  # the weights that the engine started with
        return NO_VERSION, []
    starts = (output.kv_transfer_params or {}).get(PUSHES, [])
    end = len(pushed) - pushed[::-1].index(spans[0][1])
    versions = [NO_VERSION] * max(0, len(starts) + 1 - end) + [*pushed[max(0, end - 1 - len(starts)) : end]]
    # Of pushes with no token between them the last one counts.
    return versions[0], [*dict(zip(starts, versions[1:], strict=True)).items()]


def sampling_params(sampling: Sampling, request: GenerateRequest) -> SamplingParams:
    """vLLM's parameters of one request: the sampled token's log-prob, no text, one output when it is finished."""
    stop = [*sampling.stop, *request.stop]
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        stop=stop or None,
        detokenize=bool(stop),
        ignore_eos=sampling.ignore_eos,
        max_tokens=request.max_tokens,
        seed=request.seed,
        logprobs=0,
        flat_logprobs=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
        routed_experts_prompt_start=request.num_routed,
        skip_clone=True,
    )


async def finished_groups(tasks: list[asyncio.Task], gone: asyncio.Task) -> AsyncIterator[list[Response]]:
    """The results of tasks as they come, in groups of those that are ready; ends early if the client is gone."""
    pending: set[asyncio.Task] = {*tasks, gone}
    while len(pending) > 1:
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        if gone in done:
            return
        yield [task.result() for task in done]


async def disconnected(receive: Callable) -> None:
    """Return when the client has closed its connection."""
    with suppress(Exception):
        while (await receive())["type"] != "http.disconnect":
            pass


async def read_body(receive: Callable) -> bytes:
    """The whole body of a request."""
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


def again(body: bytes, receive: Callable) -> Callable[[], Awaitable[dict]]:
    """``receive`` for whoever reads a body that has been read."""
    first = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> dict:
        return first.pop() if first else await receive()

    return receive_again


async def answer(send: Callable, status: int, body: bytes) -> None:
    """Send a whole JSON answer."""
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
