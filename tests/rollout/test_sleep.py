"""Engines on the trainer's GPUs: they sleep, wake part by part, take weights, and start again only in their turn.

vLLM on CPU frees no memory when it sleeps; everything around that is real. The tests share a node of two engines and
run in order; engines that a test kills are back before it ends.
"""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_vcppo.config import WeightSyncConfig
from megatron_vcppo.mcore.rank_messages import RankGroup
from megatron_vcppo.rollout import engine_http, messages
from megatron_vcppo.rollout.generation import RolloutError
from megatron_vcppo.rollout.messages import CACHE, WEIGHTS, Sampling, Status
from megatron_vcppo.rollout.node_folder import TRAINER, Hold, NodeFolder
from megatron_vcppo.rollout.rendezvous import Engine
from megatron_vcppo.run.processes import alive
from megatron_vcppo.run.secret import read_secret
from megatron_vcppo.weight_sync.push_plan import SINGLE
from megatron_vcppo.weight_sync.sync import WeightSync, WeightSyncError
from megatron_vcppo.weight_sync.transport import HostTransport, Tensors
from megatron_vcppo.weight_sync.turns import SleepingSync
from tests.helpers.engines import processes_of, wait_for_successor, wait_until
from tools.benchmarks._rollout_node import GREEDY, RolloutNode, make_prompts, save_policy, weights_of

pytestmark = pytest.mark.timeout(300)
PROMPTS = make_prompts(4)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [save_policy(folder / f"m{seed}", "qwen2", tied=True, seed=seed) for seed in range(2)]


@pytest.fixture(scope="module")
def node(tmp_path_factory, models) -> Iterator[RolloutNode]:
    settings = {"engine": {"per_node": 2, "max_num_seqs": 16}, "health_timeout_s": 8.0}
    with RolloutNode(tmp_path_factory.mktemp("node"), models[0], settings, engines_on="trainer_gpus") as node:
        node.wait(2)
        yield node


@pytest.fixture(scope="module")
def shared(node: RolloutNode) -> Iterator[NodeFolder]:
    with NodeFolder(node.rendezvous, 0) as shared:
        yield shared


@pytest.fixture(scope="module")
def trainer(shared: NodeFolder) -> Iterator[Hold]:
    """The trainer lives."""
    with shared.hold(TRAINER) as hold:
        yield hold


@pytest.fixture
def sync(node: RolloutNode, shared: NodeFolder, trainer: Hold) -> SleepingSync:
    transport = HostTransport(shared, node.rendezvous, 1 << 16)
    return SleepingSync(WeightSyncConfig(timeout_s=60.0), node.rendezvous, SINGLE, RankGroup(60.0), transport)


def states(node: RolloutNode) -> list[Status]:
    async def ask() -> list[Status]:
        async with engine_http.open_session(read_secret(node.rendezvous / "secret")) as session:
            return [await engine_http.status(session, engine, 10.0) for engine in node.engines()]

    return asyncio.run(ask())


def test_a_new_engine_is_published_asleep_and_cannot_be_used(node, models, sync, shared) -> None:
    assert shared.starting() == []
    assert [status.state for status in states(node)] == ["asleep"] * 2
    with pytest.raises(RolloutError, match="asleep, policy version -1"):
        node.client(all_dead_timeout_s=2.0).generate(PROMPTS, 0, messages.NO_VERSION, GREEDY, 1)
    with pytest.raises(WeightSyncError, match=r"engine_0_0 at .*asleep: its weights must wake first"):
        WeightSync.push(sync, 1, weights_of(models[0]), sync.answering())
    assert [status.state for status in states(node)] == ["asleep"] * 2


def test_it_wakes_in_parts_around_a_push_and_gives_a_fresh_engines_output(node, models, sync, shared) -> None:
    seen: list[tuple[str, int]] = []

    def after_push() -> None:
        seen.extend((status.state, status.policy_version) for status in states(node))
        assert any(shared.weights.rglob("*.safetensors"))

    sync.after_push = after_push
    pushed = sync.sync(1, weights_of(models[0]))
    assert len(pushed.engines) == 2 and seen == [("waking", 1)] * 2
    assert [status.state for status in states(node)] == ["serving"] * 2
    before = node.greedy(1, PROMPTS)
    sync.put_to_sleep(2)
    assert [(status.state, status.policy_version) for status in states(node)] == [("asleep", messages.NO_VERSION)] * 2
    sync.put_to_sleep(2)
    sync.sync(2, weights_of(models[1]))
    assert node.greedy(2, PROMPTS) != before
    sync.put_to_sleep(1)
    assert [status.policy_version for status in states(node)] == [2, 2], "level 1 keeps the weights"
    sync.sync(3, weights_of(models[0]))
    assert node.greedy(3, PROMPTS) == before


def test_sleep_ends_what_runs(node, models, sync) -> None:
    """A trainer that was killed in mid-generation leaves requests behind."""
    client = node.client(max_tokens=200, all_dead_timeout_s=1.0)

    async def abandoned() -> None:
        wanted = client.plan(make_prompts(800), 0, 1)  # many seconds' work
        sampling = Sampling(temperature=0.0, ignore_eos=True)
        task = asyncio.create_task(client.generate_async(wanted, 3, sampling, lambda _: None, lambda: False))
        await asyncio.sleep(1.0)
        await asyncio.to_thread(sync.put_to_sleep, 2)
        with pytest.raises(RolloutError):
            await task

    asyncio.run(abandoned())
    assert [(status.state, status.running) for status in states(node)] == [("asleep", 0)] * 2
    sync.sync(3, weights_of(models[0]))
    assert node.greedy(3, PROMPTS) == node.greedy(3, PROMPTS)


def test_an_engine_that_half_woke_goes_to_sleep_again(node, sync) -> None:
    sync.put_to_sleep(2)
    sync.wake(sync.answering(), WEIGHTS)
    assert [status.state for status in states(node)] == ["waking"] * 2
    sync.put_to_sleep(2)
    sync.wake(sync.answering(), CACHE)
    sync.wake(sync.answering(), WEIGHTS)
    assert [status.state for status in states(node)] == ["serving"] * 2


@pytest.mark.slow
def test_an_engine_that_is_killed_in_the_trainers_turn_waits_for_its_own(node, models, sync, shared) -> None:
    victim = node.engines()[0]
    shared.give_turn("trainer")
    sync.put_to_sleep(2)
    os.kill(victim.pid, signal.SIGKILL)
    wait_until(lambda: len(node.engines()) == 1, 20, f"{victim.name} is withdrawn")
    time.sleep(3)
    assert shared.starting() == [] and len(node.engines()) == 1, "it must not start"
    shared.give_turn("engines")
    sync.sync(4, weights_of(models[0]))
    wait_for_successor(node, victim)
    assert sorted(status.state for status in states(node)) == ["asleep", "serving"]
    source_is_gone = weights_of(Path("/nonexistent"))
    joined = sync.update_joiners(4, source_is_gone)
    assert joined is not None and [engine.name for engine in joined.engines] == [victim.name]
    assert [(status.state, status.policy_version) for status in states(node)] == [("serving", 4)] * 2
    assert node.greedy(4, PROMPTS) == node.greedy(4, PROMPTS)


@pytest.mark.slow
def test_an_engine_lost_before_it_has_its_cache_costs_no_second_pass_over_the_weights(
    node, models, sync, shared
) -> None:
    """The trainer's weights may have left the GPU by then (weight_sync.offload_weights)."""
    victim = node.engines()[0]
    passes: list[int] = []

    def once() -> Tensors:
        passes.append(len(passes))
        assert len(passes) == 1, "the weights are in host memory"
        return weights_of(models[0])()

    def kill_the_victim_once() -> None:
        if victim in node.engines():
            os.kill(victim.pid, signal.SIGKILL)
            wait_until(lambda: not alive(victim.pid), 10, f"{victim.name} is dead")

    sync.put_to_sleep(2)
    sync.after_push = kill_the_victim_once
    pushed = sync.sync(5, once)
    assert [engine.name for engine in pushed.engines] == ["engine_0_1"] and len(passes) == 1
    wait_for_successor(node, victim)


@pytest.mark.slow
def test_a_hung_engine_is_replaced_and_sleep_waits_for_that(node, sync, shared) -> None:
    victim: Engine = node.engines()[1]
    for process in processes_of(victim.pid):
        process.suspend()
    shared.give_turn("trainer")
    started = time.monotonic()
    sync.turn_timeout_s = 5.0
    sync.put_to_sleep(2)
    assert time.monotonic() - started < 45 and victim not in node.engines()
    assert [status.state for status in states(node)] == ["asleep"]
    shared.give_turn("engines")
    wait_for_successor(node, victim)


@pytest.mark.slow
def test_an_engine_that_cannot_sleep_is_named_at_the_deadline(node, sync) -> None:
    sync.wake(sync.answering(), WEIGHTS)
    sync.wake(sync.answering(), CACHE)
    victim = node.engines()[0]
    sync.config, sync.turn_timeout_s = WeightSyncConfig(timeout_s=1.0), 1.0
    process = processes_of(victim.pid)[0]
    process.suspend()
    try:
        with pytest.raises(
            WeightSyncError, match=rf"engines are not asleep after 1 s: {victim.name} at .*Timeout"
        ) as e:
            sync.put_to_sleep(2)
        assert e.value.lost == [victim]
    finally:
        process.resume()


def test_nothing_stays_in_the_nodes_memory_when_trainer_and_supervisor_end(node, shared, trainer) -> None:
    shared.weights.mkdir(exist_ok=True)
    time.sleep(2)
    assert shared.weights.exists(), "the trainer lives"
    trainer.close()
    wait_until(lambda: not shared.weights.exists(), 10, "the supervisor removed the weights")
    shared.use.close()
    node.process.send_signal(signal.SIGTERM)
    node.process.wait(30)
    assert not shared.path.exists()
