"""A rollout node of two real engines: who gets in, what comes out, and what happens when engines die or hang.

The tests share the node and run in order; engines that a test kills are back before it ends.
"""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import aiohttp
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_vcppo.records import Prompt, Rollout
from megatron_vcppo.rollout import engine_http, messages
from megatron_vcppo.rollout.auth import Call
from megatron_vcppo.rollout.generation import RolloutError
from megatron_vcppo.rollout.messages import Sampling
from megatron_vcppo.rollout.turns import ToolCalls
from megatron_vcppo.run.processes import alive
from megatron_vcppo.run.secret import read_secret
from megatron_vcppo.tasks.word_tokenizer import WORDS, build_tokenizer
from megatron_vcppo.weight_sync.joiners import begin, finish_with_joiners
from megatron_vcppo.weight_sync.sync import WeightSyncError
from megatron_vcppo.weight_sync.transport import DiskTransport
from tests.helpers.engines import processes_of, wait_for_successor, wait_until
from tools.benchmarks._rollout_node import GREEDY, RolloutNode, make_prompts, save_policy, weights_of

pytestmark = pytest.mark.timeout(300)

PROMPTS = make_prompts(8)
ROUTES = [
    ("GET", "/"), ("GET", "/health"), ("GET", "/version"), ("GET", "/metrics"), ("GET", "/docs"), ("GET", "/load"),
    ("GET", "/openapi.json"), ("GET", "/v1/models"), ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"),
    ("POST", "/v1/responses"), ("POST", "/v1/messages"), ("POST", "/tokenize"), ("POST", "/detokenize"),
    ("POST", "/ping"), ("POST", "/invocations"), ("POST", "/scale_elastic_ep"), ("POST", "/pause"),
    ("POST", "/collective_rpc"), ("POST", "/update_weights"), ("POST", "/inference/v1/generate"),
    ("POST", messages.GENERATE), ("POST", messages.SYNC), ("GET", messages.STATUS),
    ("OPTIONS", "/v1/models"), ("PUT", "/nothing"),
]  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [save_policy(folder / f"m{seed}", "qwen2", tied=True, seed=seed) for seed in range(2)]


@pytest.fixture(scope="module")
def node(tmp_path_factory, models) -> Iterator[RolloutNode]:
    settings = {"engine": {"per_node": 2, "max_num_seqs": 64}}
    with RolloutNode(tmp_path_factory.mktemp("node"), models[0], settings) as node:
        node.wait(2)
        yield node


def sampled(node: RolloutNode, count: int, iteration: int = 0, version: int = 1, **changes) -> list[Rollout]:
    client = node.client(**{"max_tokens": 200, **changes})
    return client.generate(make_prompts(count), iteration, version, Sampling(ignore_eos=True), 1)


def test_every_route_of_every_engine_asks_for_the_secret(node) -> None:
    async def knock(url: str, method: str, path: str, headers: dict[str, str]) -> int:
        async with aiohttp.ClientSession() as session, session.request(method, url + path, headers=headers) as reply:
            assert reply.status == 200 or b"unauthorized" in await reply.read()
            return reply.status

    async def shake_hands(url: str) -> int:
        async with aiohttp.ClientSession() as session:
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await session.ws_connect(url + "/v1/realtime")
            return refused.value.status

    secret = read_secret(node.rendezvous / "secret")
    for engine in node.engines():
        version = Call("GET", "/version", engine.place)
        elsewhere = Call("GET", "/version", engine.place + "0").headers(secret)
        wrong = [{}, version.headers("wrong"), elsewhere, {"Authorization": secret}, {"Authorization": "Bearer "}]
        wrong.append({"Authorization": f"Bearer {secret}"})
        for method, path in ROUTES:
            for headers in wrong:
                assert asyncio.run(knock(engine.url, method, path, headers)) == 401, (method, path)
        assert asyncio.run(knock(engine.url, "GET", "/version", version.headers(secret))) == 200
        assert asyncio.run(shake_hands(engine.url)) == 403
    assert secret not in node.logs()
    assert all(secret not in " ".join(p.cmdline()) for e in node.engines() for p in processes_of(e.pid))


def test_nothing_listens_beyond_the_interface(node) -> None:
    for engine in node.engines():
        addresses = {c.laddr.ip for p in processes_of(engine.pid) for c in p.net_connections("inet")
                     if c.status == psutil.CONN_LISTEN and c.laddr.port == engine.port}  # fmt: skip
        assert addresses == {"127.0.0.1"}


def test_greedy_output_and_logprobs_are_those_of_transformers_after_a_push(node, models, tmp_path) -> None:
    """Both transports; the engines were started from the other model."""
    model = AutoModelForCausalLM.from_pretrained(models[1], dtype=torch.float32).eval()
    before = node.greedy(messages.NO_VERSION, PROMPTS)
    for version, transport in ((101, None), (102, DiskTransport(tmp_path / "weights", 1 << 14))):
        result = node.weight_sync(transport=transport).sync(version, weights_of(models[1]))
        assert len(result.engines) == 2 and result.policy_version == version
        rollouts = node.client(max_tokens=24).generate(PROMPTS, 0, version, GREEDY, 1)
        assert [tuple(r.response_ids) for r in rollouts] != before
        for rollout in rollouts:
            assert rollout.policy_version == version
            ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.response_ids]])
            with torch.no_grad():
                logits = model(ids).logits[0, len(rollout.prompt.token_ids) - 1 : -1]
            assert logits.argmax(-1).tolist() == list(rollout.response_ids)
        node.weight_sync(transport=transport).sync(version + 10, weights_of(models[0]))
        assert node.greedy(version + 10, PROMPTS) == before


def test_sampled_logprobs_are_the_policys_and_seeds_repeat(node, models) -> None:
    node.weight_sync().sync(1, weights_of(models[1]))
    model = AutoModelForCausalLM.from_pretrained(models[1], dtype=torch.float32).eval()
    client = node.client(max_tokens=40)
    arrived: list[Rollout] = []
    rollouts = client.generate(PROMPTS, 3, 1, Sampling(temperature=0.7), 2, arrived.append)
    assert sorted(arrived, key=lambda r: (r.prompt.prompt_id, r.sample_index)) == rollouts
    assert [(r.prompt.prompt_id, r.sample_index) for r in rollouts] == [
        (p.prompt_id, s) for p in PROMPTS for s in (0, 1)
    ]
    for rollout in rollouts:
        ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.response_ids]])
        with torch.no_grad():
            logits = model(ids).logits[0, len(rollout.prompt.token_ids) - 1 : -1] / 0.7
        expected = logits.log_softmax(-1).gather(1, torch.tensor(rollout.response_ids)[:, None])[:, 0]
        assert torch.allclose(torch.tensor(rollout.rollout_logprobs), expected, atol=1e-3)
        assert rollout.finish_reason == ("stop" if rollout.response_ids[-1] == 2 else "length")
        assert rollout.response_text == str(list(rollout.response_ids))
    assert len({tuple(r.response_ids) for r in rollouts}) > len(rollouts) // 2
    again = client.generate(PROMPTS, 3, 1, Sampling(temperature=0.7), 2)
    assert [r.response_ids for r in again] == [r.response_ids for r in rollouts]
    other = client.generate(PROMPTS, 4, 1, Sampling(temperature=0.7), 2)
    assert [r.response_ids for r in other] != [r.response_ids for r in rollouts]


def test_a_response_continues_behind_what_a_tool_wrote(node, models) -> None:
    """Log-probs of every turn are those of the model on the whole sequence; the budget is that of the response."""
    model = AutoModelForCausalLM.from_pretrained(models[1], dtype=torch.float32).eval()
    tokenizer = build_tokenizer()
    wrote = [WORDS.index("back"), WORDS.index("3")]
    seen: list[str] = []

    def call(prompt: Prompt, text: str) -> "Future[str]":
        seen.append(text)
        written: Future[str] = Future()
        written.set_result("back 3")
        return written

    tools = ToolCalls({"test": "7"}, call, lambda text: tokenizer.encode(text, add_special_tokens=False), max_calls=3)
    client = replace(node.client(max_tokens=100), decode=tokenizer.decode, tools=tools)
    sampling = Sampling(ignore_eos=True)
    rollouts = client.generate(PROMPTS, 3, 1, sampling, 1)
    assert sum(len(rollout.observations) for rollout in rollouts) == len(seen) > 0
    assert all("7" in text.split()[-1] for text in seen) and any("7 back 3" in text for text in seen)
    for rollout in rollouts:
        ids = list(rollout.response_ids)
        assert len(ids) == 100 and rollout.truncated and rollout.response_text == tokenizer.decode(ids)
        calls = [t for t, token in enumerate(ids) if "7" in WORDS[token]][:3]  # 7, +7, #17, …
        assert rollout.observations == tuple((t + 1, min(t + 3, 100)) for t in calls if t + 1 < 100)
        whole = torch.tensor([[*rollout.prompt.token_ids, *ids]])
        with torch.no_grad():
            logprobs = model(whole).logits[0, len(rollout.prompt.token_ids) - 1 : -1].log_softmax(-1)
        expected = logprobs.gather(1, torch.tensor(ids)[:, None])[:, 0]
        for start, end in rollout.observations:
            assert ids[start:end] == wrote[: end - start]
            expected[start:end] = 0.0
        assert torch.allclose(torch.tensor(rollout.rollout_logprobs), expected, atol=1e-3)
    assert client.generate(PROMPTS, 3, 1, sampling, 1) == rollouts


def test_a_stop_string_ends_a_response(node) -> None:
    plain = sampled(node, 8, max_tokens=60)
    word = "7"
    stopped = node.client(max_tokens=60).generate(make_prompts(8), 0, 1, Sampling(ignore_eos=True, stop=[word]), 1)
    assert {r.finish_reason for r in plain} == {"length"}
    assert any(r.finish_reason == "stop" and len(r.response_ids) < 60 for r in stopped)


def test_a_request_that_is_refused_is_an_error_not_a_loop(node) -> None:
    with pytest.raises(RolloutError, match="was refused"):
        node.client().generate(PROMPTS[:1], 0, 1, Sampling(temperature=-1.0), 1)


def test_without_an_engine_of_the_wanted_version_generation_fails_in_time(node) -> None:
    with pytest.raises(RolloutError, match=r"no engine with policy version 55 .*policy version 1"):
        node.client(all_dead_timeout_s=2.0).generate(PROMPTS, 0, 55, GREEDY, 1)


def test_running_responses_survive_a_push_that_keeps_them(node, models) -> None:
    """They say which token was sampled under which weights: log-probs agree."""
    client = node.client(max_tokens=200)
    stream = client.stream(1, Sampling(ignore_eos=True))
    arrived: list[tuple[float, Rollout]] = []
    for request in client.plan(make_prompts(64), 0, 1):
        stream.add(request, lambda rollout: arrived.append((time.monotonic(), rollout)))
    wait_until(lambda: sum(asyncio.run(count_running(node))) == 64, 20, "64 requests running")
    sync = node.weight_sync(pause="keep")
    pushed = sync.sync(2, weights_of(models[0]))
    end = time.monotonic()
    stream.policy_version = 2
    for request in client.plan(make_prompts(72)[64:], 0, 1):
        stream.add(request, lambda rollout: arrived.append((time.monotonic(), rollout)))
    wait_until(lambda: len(arrived) == 72 or stream.failure, 120, "all responses")
    stream.close()
    assert stream.failure is None and len(pushed.engines) == 2
    rollouts = {rollout.prompt.prompt_id: rollout for _, rollout in arrived}
    assert all(len(r.response_ids) == 200 for r in rollouts.values())
    assert max(when for when, _ in arrived) > end, "nothing was running any more when the push ended"
    assert all([*rollouts[f"p{i}"].versions()] == [(2, 200)] for i in range(64, 72))
    spanning = [rollout for rollout in rollouts.values() if rollout.version_changes]
    assert spanning and all([version for version, _ in rollout.versions()] == [1, 2] for rollout in spanning)
    weights = [AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval() for model in models]
    for rollout in spanning[:4]:
        ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.response_ids]])
        with torch.no_grad():
            by_version = {
                version: model(ids).logits[0, len(rollout.prompt.token_ids) - 1 : -1].log_softmax(-1)
                for version, model in ((1, weights[1]), (2, weights[0]))
            }
        expected = torch.cat([by_version[v].split([n for _, n in rollout.versions()])[i]
                              for i, (v, _) in enumerate(rollout.versions())])  # fmt: skip
        chosen = expected.gather(1, torch.tensor(rollout.response_ids)[:, None])[:, 0]
        assert torch.allclose(torch.tensor(rollout.rollout_logprobs), chosen, atol=1e-3)
    node.weight_sync().sync(1, weights_of(models[1]))


async def count_running(node: RolloutNode) -> list[int]:
    async with engine_http.open_session(read_secret(node.rendezvous / "secret")) as session:
        return [(await engine_http.status(session, engine, 10.0)).running for engine in node.engines()]


def test_an_engine_killed_in_mid_generation_loses_nothing_and_comes_back(node, models) -> None:
    victim = node.engines()[0]
    first = threading.Event()
    arrived: list[tuple[str, int]] = []

    def on_rollout(rollout: Rollout) -> None:
        arrived.append((rollout.prompt.prompt_id, rollout.sample_index))
        first.set()

    def produce() -> list[Rollout]:
        return node.client(max_tokens=200).generate(make_prompts(150), 0, 1, Sampling(ignore_eos=True), 2, on_rollout)

    def kill() -> None:
        first.wait(60)
        os.kill(victim.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    rollouts = finish_with_joiners(node.weight_sync(), 1, weights_of(models[1]), begin(produce))
    killer.join()
    assert not alive(victim.pid)
    assert rollouts is not None and len(rollouts) == 300 == len(arrived) == len(set(arrived))
    assert all(len(r.response_ids) == 200 and r.policy_version == 1 for r in rollouts)
    wait_for_successor(node, victim)
    joined = node.weight_sync().update_joiners(1, weights_of(models[1]))
    assert joined is not None and [engine.name for engine in joined.engines] == ["engine_0_0"]
    assert node.weight_sync().update_joiners(1, weights_of(models[1])) is None
    assert node.greedy(1, PROMPTS) == node.greedy(1, PROMPTS)


@pytest.mark.slow
def test_an_engine_killed_in_mid_push_is_named_and_the_others_get_the_weights(node, models) -> None:
    victim, survivor = node.engines()
    sync = node.weight_sync(timeout_s=8.0)
    seen: list[str] = []

    def slow_source():
        for index, (name, tensor) in enumerate(weights_of(models[0])()):
            if index == 10 and not seen:
                seen.append(name)
                os.kill(victim.pid, signal.SIGKILL)
                time.sleep(0.5)
            yield name, tensor

    with pytest.raises(WeightSyncError, match=rf"{victim.name} at .*lost") as failure:
        sync.push(2, slow_source, sync.answering())
    assert failure.value.lost == [victim] and survivor.name not in str(failure.value)
    result = sync.sync(2, weights_of(models[0]))
    assert survivor in result.engines
    wait_for_successor(node, victim)
    sync.update_joiners(2, weights_of(models[0]))
    assert node.greedy(2, PROMPTS) == node.greedy(2, PROMPTS)


def test_a_hung_engine_is_replaced(node, models) -> None:
    """Its processes are stopped: connections stand, nothing answers."""
    sync = node.weight_sync(timeout_s=8.0)
    victim = node.engines()[1]
    for process in processes_of(victim.pid):
        process.suspend()
    result = sync.sync(3, weights_of(models[1]))
    assert victim not in result.engines
    rollouts = sampled(node, 20, version=3, max_tokens=20)
    assert len(rollouts) == 20
    # How a successor answers and gets its weights: test_an_engine_killed_in_mid_generation_…
    wait_until(lambda: len(supervised(node)) == 2 and not alive(victim.pid), 60, f"{victim.name} is started again")


def supervised(node: RolloutNode) -> list[psutil.Process]:
    """The first process of each engine, also of one that is still starting; not one that waits to be reaped."""
    return [process for process in psutil.Process(node.process.pid).children() if alive(process.pid)]


def test_nothing_is_left_when_the_supervisor_is_killed_outright(node) -> None:
    """Neither an engine that answers nor one that is starting."""
    wait_until(lambda: len(supervised(node)) == 2, 60, "both engines have a process")
    pids = [process.pid for engine in supervised(node) for process in processes_of(engine.pid)]
    assert len(pids) >= 3
    node.process.kill()
    wait_until(lambda: not any(alive(pid) for pid in pids), 10, "all engine processes are gone")
