"""Stages that are asked to stop within an iteration: nothing that was generated or trained is lost or done twice."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_vcppo.mcore.learner import Learner
from megatron_vcppo.report.metrics import read_metrics
from megatron_vcppo.rollout import link
from megatron_vcppo.rollout.store import partial_iterations, read_partial, read_rollouts, stored_iterations
from megatron_vcppo.stages import ppo as ppo_module
from megatron_vcppo.stages.stopping import SAVED
from tests.helpers.rollout_node import RolloutNode
from tests.helpers.rollout_stages import Stage, make_config, make_task

PPO: dict[str, Any] = {"iterations": 3, "ppo_epochs": 2, "minibatches": 2, "checkpoint": {"save_every": 100}}
"""Only what is asked for is saved, and the end."""


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_task(tmp_path_factory.mktemp("stops") / "task")


@pytest.fixture(scope="module")
def node(task: Path) -> Iterator[RolloutNode]:
    with RolloutNode(task.parent / "node", task / "base_model", {"engine": {"max_num_seqs": 8}}) as node:
        node.wait()
        yield node


def ask_to_stop(rank: int = 0) -> None:
    """As Slurm or the controller does, on one rank: the others must follow."""
    if os.environ["RANK"] == str(rank):
        os.kill(os.getpid(), signal.SIGUSR2)


def hold_responses(after: int, then: Callable[[], None] = lambda: None) -> None:
    """In this process: the engines answer no more after so many responses."""
    generate, seen = link.generate, 0

    async def answer(*arguments: Any) -> AsyncIterator[Any]:
        nonlocal seen
        async for response in generate(*arguments):
            if seen >= after:
                then()
                await asyncio.sleep(3600)
            seen += 1
            yield response

    link.generate = answer  # type: ignore[assignment]


def at_call(owner: Any, name: str, number: int, do: Callable[[], None]) -> None:
    """In this process: do something within the so-many-th call of a function."""
    function, calls = getattr(owner, name), 0

    def counted(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            do()
        return function(*arguments, **keywords)

    setattr(owner, name, counted)


def newest(stage: Stage) -> dict[str, Any]:
    """state.json of the newest checkpoint."""
    path = max((stage.folder / "checkpoints").glob("iter_*"))
    return json.loads((path / "state.json").read_text())


def learned(stage: Stage) -> list[dict[str, Any]]:
    """The log without times."""
    timed = ("time/", "stopping/", "weight_sync/", "timestamp")
    return [{k: v for k, v in record.items() if not k.startswith(timed)} for record in read_metrics(stage.folder)]


def test_a_stop_within_an_iteration_loses_nothing(node: RolloutNode, task: Path, tmp_path: Path) -> None:
    """During generation, between two phases, between two optimizer steps, and during the evaluation."""
    config = make_config(task, tmp_path / "run", {"ppo": PPO | {"evaluate_every": 2, "critic": {"init": "sft"}}})
    stage = Stage(node, config, "ppo")
    rollouts = stage.folder / "rollouts"

    assert set(stage.run(lambda: hold_responses(3, ask_to_stop))) == {SAVED}
    kept = read_partial(rollouts, 1)
    assert len(kept) == 3 and stored_iterations(rollouts) == [] and not list(stage.folder.glob("checkpoints/iter_*"))

    # The missing five, then the first call for values comes after that for log-probs.
    assert set(stage.run(lambda: at_call(ppo_module, "token_outputs", 2, lambda: ask_to_stop(1)))) == {SAVED}
    complete = {(r.prompt.prompt_id, r.sample_index): r.response_ids for r in read_rollouts(rollouts, 1)}
    assert len(complete) == 8 and partial_iterations(rollouts) == []
    for rollout in kept:
        assert complete[rollout.prompt.prompt_id, rollout.sample_index] == rollout.response_ids

    # Of the eight optimizer steps of iteration 1 three are done, then three more.
    for done in (3, 6):
        assert set(stage.run(lambda: at_call(Learner, "train_step", 3, lambda: ask_to_stop(1)))) == {SAVED}
        state = newest(stage)
        assert state["iteration"] == 0 and state["state"]["prompts"]["samples_seen"] == 0
        assert sum(map(len, state["state"]["unfinished"]["report"]["skipped"].values())) == done

    # The rest of iteration 1, iteration 2, and part of its evaluation.
    assert set(stage.run(lambda: hold_responses(8 + 2, ask_to_stop))) == {SAVED}
    assert partial_iterations(rollouts) == [-3] and len(read_partial(rollouts, -3)) == 2
    assert [record["iteration"] for record in read_metrics(stage.folder)] == [1]

    assert set(stage.run()) == {0} and partial_iterations(rollouts) == []
    stage.assert_every_prompt_once(8, 3, config.run.seed)
    again = stage.replay(node, tmp_path / "again")
    assert again.checkpoint() == stage.checkpoint() and learned(again) == learned(stage)
