"""The routes in front of an engine, where a real engine on CPU cannot fail: a change of its GPU memory."""

import asyncio
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from megatron_vcppo.rollout.auth import PLACE_VARIABLE, Call, digest_of
from megatron_vcppo.rollout.messages import (
    CORE_IS_DEAD,
    NO_VERSION,
    PUSHES,
    SLEEP,
    STATUS,
    WAKE,
    SleepRequest,
    TurnReport,
    WakeRequest,
)
from megatron_vcppo.rollout.middleware import Middleware, answer, read_body, versions_of
from megatron_vcppo.run.secret import SECRET_FILE_VARIABLE, make_secret, read_secret

PLACE = "127.0.0.1:1, start 0 of engine_0_0"
OUT_OF_MEMORY = "CUDA Error: out of memory at cumem_allocator.cpp"


class FullGpu:
    """An engine that finds no memory for its cache when it wakes; what was asked of it is in ``calls``."""

    errored = False
    vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(world_size_across_dp=1))

    def __init__(self) -> None:
        self.calls: list[str] = []

    async def get_weight_version(self) -> str:
        return ""

    async def sleep(self, level: int, mode: str) -> None:
        self.calls.append(f"sleep {level}")

    async def wake_up(self, parts: list[str]) -> None:
        self.calls.append(f"wake {parts}")
        if "kv_cache" in parts:
            raise RuntimeError(OUT_OF_MEMORY)


def test_an_engine_that_could_not_wake_is_to_be_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it holds is unknown: it reports no sleep that it may not have, and its supervisor ends it."""
    make_secret(tmp_path / "secret")
    monkeypatch.setenv(SECRET_FILE_VARIABLE, str(tmp_path / "secret"))
    monkeypatch.setenv(PLACE_VARIABLE, PLACE)
    front, engine = Middleware(None), FullGpu()  # type: ignore[arg-type]
    secret = read_secret(tmp_path / "secret")

    def ask(method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        sent: list[dict] = []
        content = msgspec.json.encode(body)

        async def receive() -> dict:
            return {"type": "http.request", "body": content}

        async def send(message: dict) -> None:
            sent.append(message)

        app = SimpleNamespace(state=SimpleNamespace(engine_client=engine))
        given = Call(method, path, PLACE, digest_of(content)).headers(secret)["Authorization"].encode()
        scope = {"type": "http", "method": method, "path": path, "headers": [(b"authorization", given)], "app": app}
        asyncio.run(front(scope, receive, send))
        return sent[0]["status"], sent[1]["body"]

    def turn(path: str, body: Any) -> str:
        status, answer = ask("POST", path, body)
        assert status == 200
        return msgspec.json.decode(answer, type=TurnReport).error

    assert turn(SLEEP, SleepRequest(2, 5.0)) == turn(WAKE, WakeRequest(["weights"], 5.0)) == ""
    assert ask("GET", STATUS)[0] == 200
    assert turn(WAKE, WakeRequest(["kv_cache"], 5.0)) == f"RuntimeError: {OUT_OF_MEMORY}"
    asked = list(engine.calls)
    status, answer = ask("GET", STATUS)
    assert status == CORE_IS_DEAD and OUT_OF_MEMORY in answer.decode()
    assert turn(SLEEP, SleepRequest(2, 5.0)) == f"RuntimeError: {OUT_OF_MEMORY}"
    assert engine.calls == asked == ["sleep 2", "wake ['weights']", "wake ['kv_cache']"]


def test_a_request_is_served_once_and_with_its_own_body(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also before vLLM's own routes, which read the body that the check has read."""
    make_secret(tmp_path / "secret")
    monkeypatch.setenv(SECRET_FILE_VARIABLE, str(tmp_path / "secret"))
    monkeypatch.setenv(PLACE_VARIABLE, PLACE)
    read: list[bytes] = []

    async def vllm(scope: dict, receive: Any, send: Any) -> None:
        read.append(await read_body(receive))
        read.append((await receive())["type"].encode())
        await answer(send, 200, b"{}")

    front, secret = Middleware(vllm), read_secret(tmp_path / "secret")

    def ask(call: Call, body: bytes, **scope: Any) -> int:
        parts = [body[:1], body[1:]]
        messages = [{"type": "http.request", "body": part, "more_body": part == parts[0]} for part in parts]
        messages.append({"type": "http.disconnect"})
        sent: list[dict] = []

        async def receive() -> dict:
            return messages.pop(0)

        async def send(message: dict) -> None:
            sent.append(message)

        headers = [(b"authorization", call.headers(secret)["Authorization"].encode())]
        asyncio.run(front({"type": "http", "method": "POST", "path": "/x", "headers": headers, **scope}, receive, send))
        return sent[0]["status"]

    body = b"generate this"
    call = Call("POST", "/x", PLACE, digest_of(body))
    assert ask(call, b"generate that") == 401 and not read
    assert ask(call, body) == 401, "its number is used"
    again = replace(call, number="0" * 32)
    assert ask(again, body, query_string=b"a=1") == 401
    assert ask(replace(again, server=PLACE.replace("start 0", "start 1")), body) == 401
    assert ask(again, body) == 200 and read == [body, b"http.disconnect"]
    assert ask(again, body) == 401 and len(read) == 2


def test_a_response_says_which_tokens_are_from_which_push() -> None:
    def output(version: str, pushes: list[int] | None = None, more: list[tuple[int, str]] | None = None) -> Any:
        spans = [SimpleNamespace(start=start, version=name) for start, name in (*(more or ()), (0, version))]
        spans.sort(key=lambda span: span.start)
        parameters = None if pushes is None else {PUSHES: pushes}
        return SimpleNamespace(outputs=[SimpleNamespace(weight_versions=spans)], kv_transfer_params=parameters)

    pushed = [3, 4, 6, 7]
    assert versions_of(output("6"), pushed) == (6, [])
    assert versions_of(output("6", [5]), pushed) == (4, [(5, 6)])
    assert versions_of(output("7", [5, 9]), pushed) == (4, [(5, 6), (9, 7)])
    assert versions_of(output("7", [5, 5]), pushed) == (4, [(5, 7)]), "no token between two pushes"
    assert versions_of(output("3", [5]), pushed) == (NO_VERSION, [(5, 3)]), "begun before the first push"
    assert versions_of(output("default"), []) == (NO_VERSION, [])
    assert versions_of(output("4", more=[(8, "6")]), pushed) == (4, [(8, 6)]), "vLLM's own spans"
