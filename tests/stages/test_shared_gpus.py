"""PPO with engines on the trainer's GPUs: the same numbers as elsewhere, through kills of engines and trainer.

On CPU a sleeping engine frees nothing; the order, the memory that the trainer gives away, and the faults are real.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_vcppo.config import WeightSyncConfig
from megatron_vcppo.errors import SAVED
from megatron_vcppo.mcore.rank_messages import RankGroup
from megatron_vcppo.rollout.messages import CACHE, WEIGHTS
from megatron_vcppo.rollout.node_folder import TRAINER, NodeFolder, weights_path
from megatron_vcppo.rollout.rendezvous import engines
from megatron_vcppo.run.metrics_log import read_metrics
from megatron_vcppo.run.rollout_store import partial_iterations
from megatron_vcppo.stages import rollout_session
from megatron_vcppo.stages.shared_gpus import SharedGpus
from megatron_vcppo.stages.updates import Updater
from megatron_vcppo.weight_sync.push_plan import SINGLE
from megatron_vcppo.weight_sync.transport import HostTransport
from megatron_vcppo.weight_sync.turns import SleepingSync
from tests.helpers.reward_models import save_reward_model
from tests.helpers.rollout_stages import Stage, make_config, make_task
from tests.helpers.stops import ask_to_stop, hold_responses
from tools.benchmarks._rollout_node import RolloutNode

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_task(tmp_path_factory.mktemp("shared") / "task")


@pytest.fixture(scope="module")
def node(task: Path) -> Iterator[RolloutNode]:
    settings = {"engine": {"max_num_seqs": 8}}
    with RolloutNode(task.parent / "node", task / "base_model", settings, engines_on="trainer_gpus") as node:
        node.wait()
        yield node


def make_stage(node: RolloutNode, task: Path, run: Path, name: str = "ppo", **sections: Any) -> Stage:
    shared = {
        "cluster": {"engines_on": "trainer_gpus"},
        "weight_sync": {"offload_weights": True},
        "parallel": {"pp": 1, "dp": 2, "distributed_optimizer": True, "tokens_per_microbatch": 512},
        "ppo": {"iterations": 4, "critic": {"init": "random_head"}, "loss": {"kl_coef": 0.1}},
    }
    return Stage(node, make_config(task, run, {**shared, **sections}), name)


def wake(node: RolloutNode) -> None:
    """For a stage that knows nothing of sleep."""
    with NodeFolder(node.rendezvous, 0) as shared:
        transport = HostTransport(shared, node.rendezvous, 1 << 20)
        sync = SleepingSync(WeightSyncConfig(), node.rendezvous, SINGLE, RankGroup(60.0), transport)
        for part in (WEIGHTS, CACHE):
            sync.wake(sync.answering(), part)


def replay_elsewhere(stage: Stage, node: RolloutNode, folder: Path) -> Stage:
    """The same stage on the same rollouts, without sharing anything."""
    wake(node)
    cluster = replace(stage.config.cluster, engines_on=None)
    stage.config = replace(stage.config, cluster=cluster, weight_sync=WeightSyncConfig())
    return stage.replay(node, folder)


def kill_engine(node: RolloutNode) -> None:
    for engine in engines(node.rendezvous):
        os.kill(engine.pid, signal.SIGKILL)


def on_rank_0(work: Callable[[], None]) -> Callable[[], None]:
    return lambda: work() if os.environ["RANK"] == "0" else None


def test_the_numbers_are_those_of_engines_elsewhere(node: RolloutNode, task: Path, tmp_path: Path) -> None:
    """Evaluation inside, four pushes and sleeps, a reference, a reward model; then the same updates without sharing."""
    reward_model = save_reward_model(tmp_path / "reward_model", task / "base_model", pad=None)
    stage = make_stage(node, task, tmp_path / "run", rewards={"model": {"path": str(reward_model)}})
    assert set(stage.run()) == {0}
    assert not weights_path(node.rendezvous, 0).exists()
    records = read_metrics(stage.folder)
    assert len(records) == 4 and "evaluation/avg" in records[2]
    assert all("model_reward/score_mean" in record for record in records)
    assert replay_elsewhere(stage, node, tmp_path / "again").checkpoint() == stage.checkpoint()


@pytest.mark.slow
def test_an_engine_killed_in_the_update_waits_and_one_killed_in_generation_joins(
    node: RolloutNode, task: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"

    def faults() -> None:
        sys.stdout = sys.stderr = log.open("w", buffering=1)
        update, begin = Updater.update, rollout_session.begin
        hit: list[str] = []

        def kill_then_update(*arguments: Any, **keywords: Any) -> Any:
            if not hit:
                hit.append("update")
                kill_engine(node)
                time.sleep(4)
                shared = NodeFolder(node.rendezvous, 0)
                assert shared.is_held(TRAINER) and not shared.engines_turn
                assert not shared.starting() and not engines(node.rendezvous), "it must wait for its turn"
            return update(*arguments, **keywords)

        def begin_then_kill(produce: Any) -> Any:
            future = begin(produce)
            if hit == ["update", "weights away"]:
                assert len(engines(node.rendezvous)) == 1, "it was waited for"
                hit.append("generation")
                threading.Timer(0.3, kill_engine, [node]).start()
            return future

        give_turn = SharedGpus._give_turn

        def look_at_the_weights(gpus: SharedGpus, holder: Any) -> None:
            if hit == ["update"] and holder == "engines":
                assert not any(storage.nbytes() for storage in gpus._weights()), "the engine needs their room to start"
                hit.append("weights away")
            give_turn(gpus, holder)

        SharedGpus._give_turn = look_at_the_weights  # type: ignore[assignment,method-assign]
        Updater.update = kill_then_update  # type: ignore[method-assign]
        rollout_session.begin = begin_then_kill

    stage = make_stage(node, task, tmp_path / "run")
    started = node.log.read_text().count("starting, pid")
    assert set(stage.run(on_rank_0(faults))) == {0}, log.read_text()
    assert node.log.read_text().count("starting, pid") == started + 2
    assert len(read_metrics(stage.folder)) == 4
    assert replay_elsewhere(stage, node, tmp_path / "again").checkpoint() == stage.checkpoint()


@pytest.mark.slow
def test_a_killed_trainer_leaves_engines_that_the_next_attempt_uses(
    node: RolloutNode, task: Path, tmp_path: Path
) -> None:
    pids = [engine.pid for engine in node.engines()]
    stage = make_stage(node, task, tmp_path / "run")
    stage.run_with_kills(1, seed=2)
    stage.assert_every_prompt_once(8, 4, stage.config.run.seed)
    assert [engine.pid for engine in node.engines()] == pids
    assert not weights_path(node.rendezvous, 0).exists()
    assert replay_elsewhere(stage, node, tmp_path / "again").checkpoint() == stage.checkpoint()


@pytest.mark.slow
def test_a_stop_in_the_engines_turn_saves_what_is_in_host_memory(node: RolloutNode, task: Path, tmp_path: Path) -> None:
    """Within the second iteration's generation, when each of two leaders has one of its four responses."""
    ppo = {"iterations": 3, "critic": {"init": "random_head"}, "checkpoint": {"save_every": 100}}
    stage = make_stage(node, task, tmp_path / "run", ppo=ppo)
    assert set(stage.run(lambda: hold_responses(4 + 1, ask_to_stop))) == {SAVED}
    assert (stage.folder / "checkpoints" / "iter_0000001").exists()
    assert 2 in partial_iterations(stage.folder / "rollouts") and not weights_path(node.rendezvous, 0).exists()
    assert set(stage.run()) == {0}
    stage.assert_every_prompt_once(8, 3, stage.config.run.seed)
    assert replay_elsewhere(stage, node, tmp_path / "again").checkpoint() == stage.checkpoint()


@pytest.mark.slow
def test_the_other_stages_that_generate_take_turns(node: RolloutNode, task: Path, tmp_path: Path) -> None:
    """Fresh rollouts for every step of pretraining (each wakes and pushes), a reward model's set, an evaluation."""
    stages = {"stages": ["reward_model", "value_pretrain", "evaluate"]}
    sizes = {
        "reward_model": {"num_prompts": 8, "steps": 2, "batch_size": 4},
        "value_pretrain": {"init": "sft", "steps": 2, "batch_size": 8},
        "evaluate": {"num_samples": 1, "k": [1]},
    }
    for name in sizes:
        stage = make_stage(node, task, tmp_path / name, name, **stages, **sizes)
        assert set(stage.run()) == {0}, name
        assert stage.done and not weights_path(node.rendezvous, 0).exists()
