"""Responses in windows over kills, stops and other numbers of leaders: every token is trained on once."""

import sys
import time
import zlib
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_vcppo.config import Config, ParallelConfig
from megatron_vcppo.data.prompts import PromptStream
from megatron_vcppo.errors import Stopped
from megatron_vcppo.mcore import runtime
from megatron_vcppo.mcore.rank_messages import RankGroup
from megatron_vcppo.records import Prompt, Rollout
from megatron_vcppo.rollout.client import RolloutClient
from megatron_vcppo.rollout.generation import PendingRequest, RolloutError
from megatron_vcppo.rollout.messages import Response, Sampling
from megatron_vcppo.run.rollout_store import partial_iterations, read_rollouts, stored_iterations
from megatron_vcppo.stages.prompt_sampler import PromptSampler
from megatron_vcppo.stages.rollout_session import RolloutSession
from megatron_vcppo.stages.stopping import stopping
from megatron_vcppo.stages.stored_batches import StoredBatches
from megatron_vcppo.stages.windows import Started, owners_of
from tests.helpers.distributed import run_distributed_test

PROMPTS = [Prompt(f"p:{i}", (1, 2), "", "", "t") for i in range(40)]
SIZE, NUM_SAMPLES, WINDOW, MAX_TOKENS = 6, 2, 4, 10


def length_of(prompt: Prompt, sample: int) -> int:
    """Where a response ends, unless it is truncated before."""
    return 1 + zlib.crc32(f"{prompt.prompt_id} {sample}".encode()) % 14


class Engine(RolloutClient):
    """Answers like one: the token at a position is that position + 10."""

    stop_after: int | None = None
    """A stop is requested when it has answered that many requests; it answers no others."""
    num_answered = 0

    def answer(
        self,
        requests: list[PendingRequest],
        policy_version: int,
        sampling: Sampling,
        on_rollout: Callable[[Rollout], None],
        cancelled: Callable[[], bool],
    ) -> list[Rollout]:
        for item in requests:
            if self.num_answered == self.stop_after:
                stopping._requested.set()
                while not cancelled():
                    time.sleep(0.01)
                raise RolloutError("cancelled")
            self.num_answered += 1
            start = len(item.request.token_ids) - len(item.prompt.token_ids)
            assert item.request.token_ids[2:] == [10 + t for t in range(start)]
            end = min(length_of(item.prompt, item.sample_index), start + item.request.max_tokens)
            reason = "stop" if end == length_of(item.prompt, item.sample_index) else "length"
            ids, logprobs = [10 + t for t in range(start, end)], [-float(policy_version)] * (end - start)
            on_rollout(item.rollout(Response(item.request.key, ids, logprobs, reason, policy_version), self.decode))
        return []


def make_config(window: int | None = WINDOW, num_samples: int = NUM_SAMPLES) -> Config:
    config = Config()
    config.ppo.prompts_per_iteration, config.ppo.window_tokens = SIZE // num_samples, window
    config.rollout.num_samples, config.rollout.max_tokens = num_samples, MAX_TOKENS
    return config


def make_session(folder: Path, config: Config) -> RolloutSession:
    """Without processes of engines and verifiers, and without models."""
    session: Any = RolloutSession.__new__(RolloutSession)
    session.runtime = runtime.start(ParallelConfig(), seed=1, timeout_s=60)
    session.is_leader, session.pending = True, []
    session.gpus = session.ahead = None
    session.source, session.policy_version, session.replays_routing = object(), 0, False
    session.sync = SimpleNamespace(ranks=RankGroup(60), update_joiners=lambda *_: None)
    session.batches = StoredBatches(folder, session.runtime, session.sync.ranks, need_experts=False)
    session.client = Engine(folder, config.rollout, 64, run_seed=7, decode=lambda ids: " ".join(map(str, ids)))

    def submit(rollout: Rollout) -> Future[Rollout]:
        scored: Future[Rollout] = Future()
        scored.set_result(replace(rollout, reward=1.0))
        return scored

    session.scorer = SimpleNamespace(submit=submit, take_problems=list)
    return session


def attempt(
    folder: Path,
    state: dict[str, Any] | None,
    iterations: range,
    window: int | None = WINDOW,
    stop_after: int | None = None,
    num_samples: int = NUM_SAMPLES,
) -> tuple[list[dict[str, Any]], int]:
    """Iterations of one attempt; the state after each, and how many requests this rank's engine answered. Rank 0 is
    asked to stop where ``stop_after`` says."""
    config = make_config(window, num_samples)
    session = make_session(folder, config)
    assert isinstance(session.client, Engine)
    if session.runtime.is_main:
        session.client.stop_after = stop_after
    sampler = PromptSampler(config, session, PromptStream(PROMPTS, 0))
    if state is not None:
        sampler.load_state_dict(state)
    states = []
    try:
        for iteration in iterations:
            session.policy_version = iteration - 1
            part = sampler.next_batch(iteration)
            assert all((rollout.reward is None) == rollout.unfinished for rollout in part.rollouts)
            session.batches.finish()
            states.append(sampler.state_dict())
    except Stopped:
        pass
    return states, session.client.num_answered


def check(folder: Path, num_iterations: int) -> None:
    """Windows follow each other, prompts come in the order of the stream, and a token has one iteration."""
    assert stored_iterations(folder) == [*range(1, num_iterations + 1)]
    trained: dict[tuple[str, int], Rollout] = {}
    begun: list[tuple[str, int]] = []
    for iteration in range(1, num_iterations + 1):
        batch = read_rollouts(folder, iteration)
        assert len(batch) == SIZE
        unfinished = [sample for sample, rollout in trained.items() if rollout.unfinished]
        names = [(rollout.prompt.prompt_id, rollout.sample_index) for rollout in batch]
        assert sorted(names[: len(unfinished)]) == sorted(unfinished), "they come first"
        for sample, rollout in zip(names, batch, strict=True):
            assert rollout.continues(trained.get(sample)), "a token is lost or trained on twice"
            assert rollout.seed == trained.get(sample, rollout).seed
            assert list(rollout.versions()) == [(iteration - 1, len(rollout.response_ids) - rollout.num_trained)]
            before = trained.get(sample)
            if before is not None:
                assert rollout.rollout_logprobs[: rollout.num_trained] == before.rollout_logprobs
            wanted = min(length_of(rollout.prompt, rollout.sample_index), MAX_TOKENS)
            assert len(rollout.response_ids) == min(wanted, rollout.num_trained + WINDOW)
            assert rollout.unfinished == (len(rollout.response_ids) < wanted)
            trained[sample] = rollout
        begun += names[len(unfinished) :]
    stream = PromptStream(PROMPTS, 0)
    wanted_order = [(prompt.prompt_id, k) for prompt in stream.next(len(begun)) for k in range(NUM_SAMPLES)]
    assert begun == wanted_order[: len(begun)]
    assert max(len(rollout.response_ids) for rollout in trained.values()) == MAX_TOKENS


def test_kills_and_stops_lose_no_token_and_repeat_none(tmp_path: Path) -> None:
    """A kill after a stored batch, a stop within a window, and one, two and three leaders."""
    (states, _), *_ = run_distributed_test(attempt, 2, tmp_path, None, range(1, 4))
    assert states[1]["windows"]["unfinished"], "nothing is continued"
    # The checkpoint is that of the second iteration; the batch of the third was stored before the kill.
    third = read_rollouts(tmp_path, 3)
    found = run_distributed_test(attempt, 3, tmp_path, states[1], range(3, 5))
    assert read_rollouts(tmp_path, 3) == third
    assert sum(num_answered for _, num_answered in found) == SIZE, "of the fourth iteration only"
    state = found[0][0][-1]

    found = run_distributed_test(attempt, 2, tmp_path, state, range(5, 6), WINDOW, 1)
    assert [states for states, _ in found] == [[], []] and partial_iterations(tmp_path) == [5]
    num_before = sum(num_answered for _, num_answered in found)
    assert 0 < num_before < SIZE
    ((states, num_answered),) = run_distributed_test(attempt, 1, tmp_path, state, range(5, 8))
    assert num_answered == 3 * SIZE - num_before
    check(tmp_path, 7)


def test_what_is_unfinished_is_finished_when_windows_are_switched_off(tmp_path: Path) -> None:
    ((states, _),) = run_distributed_test(attempt, 1, tmp_path, None, range(1, 3))
    unfinished = {(one[0], one[2]) for one in states[-1]["windows"]["unfinished"]}
    ((states, _),) = run_distributed_test(attempt, 1, tmp_path, states[-1], range(3, 5), None)
    batch = read_rollouts(tmp_path, 3)
    assert len(batch) == SIZE and not any(rollout.unfinished for rollout in batch)
    assert sum(rollout.num_trained > 0 for rollout in batch) == len(unfinished) > 0
    assert not any(rollout.num_trained for rollout in read_rollouts(tmp_path, 4))


def test_a_group_baseline_takes_over_no_part_of_a_group(tmp_path: Path) -> None:
    ((states, _),) = run_distributed_test(attempt, 1, tmp_path, None, range(1, 3))
    assert states[-1]["windows"]["unfinished"]

    def names() -> list[str]:
        config = make_config(None)
        config.ppo.advantage.baseline = "rloo"
        session = make_session(tmp_path, config)
        session.policy_version = 2
        sampler = PromptSampler(config, session, PromptStream(PROMPTS, 0))
        sampler.load_state_dict(states[-1])
        return [rollout.prompt.prompt_id for rollout in sampler.next_batch(3).rollouts]

    (found,) = run_distributed_test(names, 1)
    assert len(found) == SIZE and all(found.count(name) == NUM_SAMPLES for name in found)


def test_no_sample_comes_twice_after_their_number_was_changed(tmp_path: Path) -> None:
    """Six samples of a prompt, of which some are unfinished and some not begun; then three, then six again."""
    begun: list[tuple[str, int]] = []
    state = None
    for iterations, num_samples in ((range(1, 3), 6), (range(3, 5), 3), (range(5, 8), 6)):
        ((states, _),) = run_distributed_test(attempt, 1, tmp_path, state, iterations, WINDOW, None, num_samples)
        state = states[-1]
        for iteration in iterations:
            batch = read_rollouts(tmp_path, iteration)
            names = [(rollout.prompt.prompt_id, rollout.sample_index) for rollout in batch]
            assert len({*names}) == SIZE
            begun += [name for name, rollout in zip(names, batch, strict=True) if not rollout.num_trained]
    assert len({*begun}) == len(begun)


def test_unfinished_responses_whose_batch_is_gone_begin_again(tmp_path: Path) -> None:
    ((states, _),) = run_distributed_test(attempt, 1, tmp_path, None, range(1, 3))
    unfinished = states[-1]["windows"]["unfinished"]
    for path in tmp_path.glob("iter_0000002_*"):
        path.unlink()

    def logged() -> None:
        sys.stdout = (tmp_path / "log").open("w", buffering=1)
        attempt(tmp_path, states[-1], range(3, 4))

    run_distributed_test(logged, 1)
    out = (tmp_path / "log").read_text()
    assert f"warning: {len(unfinished)} unfinished responses begin again" in out and "no rollouts of iteration 2" in out
    again = read_rollouts(tmp_path, 3)[: len(unfinished)]
    stream = PromptStream(PROMPTS, 0)
    assert [rollout.prompt.prompt_id for rollout in again] == [stream.at(one[0]).prompt_id for one in unfinished]
    assert not any(rollout.num_trained for rollout in again)


def test_a_window_that_covers_every_response_gives_the_batches_of_whole_ones(tmp_path: Path) -> None:
    for window in (None, MAX_TOKENS):
        run_distributed_test(attempt, 2, tmp_path / str(window), None, range(1, 4), window)
    for iteration in (1, 2, 3):
        assert read_rollouts(tmp_path / "None", iteration) == read_rollouts(tmp_path / str(MAX_TOKENS), iteration)


def test_leaders_keep_what_they_have_and_new_responses_even_them_out() -> None:
    batch = [Started(i, 1, 0, PROMPTS[i]) for i in range(7)]
    assert owners_of(batch, [1, 1, -1], 3) == [1, 1, 0, 2, 0, 2, 0]
    assert owners_of(batch[:2], [0, 0], 1) == [0, 0]
    assert owners_of([], [], 2) == []
