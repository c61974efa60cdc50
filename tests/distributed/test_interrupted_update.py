"""An update that a stop interrupts between optimizer steps, its checkpoint, and its resume: bit-equal, safe to kill."""

import copy
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_vcppo.config import CheckpointConfig, Config
from megatron_vcppo.errors import Stopped
from megatron_vcppo.mcore import checkpoint as checkpoint_module
from megatron_vcppo.mcore.checkpoint import CheckpointFolder, complete_checkpoints
from megatron_vcppo.mcore.learner import Learner
from megatron_vcppo.records import Rollout, RolloutPart
from megatron_vcppo.stages.unfinished import Unfinished, UpdateUnderWay
from megatron_vcppo.stages.updates import UpdateMetrics
from tests.helpers.checkpoints import checkpoint_folder
from tests.helpers.distributed import RanksFailed, run_distributed_test
from tests.helpers.ppo_update import build, make_config, make_rollouts, save_models, share_of

VARIANT: dict[str, Any] = {
    "ppo": {
        "loss": {"kl_coef": 0.05, "kl_in": "reward", "tis_cap": 2.0},
        "critic": {"updates_per_actor_update": 2, "value_clip": 0.05},
    },
    "values": {"bounds": [-1.0, 1.0]},
}
"""Every tensor that an update reads: 2 passes × 2 minibatches × (2 steps of the critic and 1 of the actor)."""
NUM_STEPS = 12


def train_up_to(config: Config, rollouts: list[Rollout], folder: Path, num_steps: int) -> dict[str, Any] | None:
    """On one rank: resume from the checkpoint in ``folder``, train until a number of steps is done, save.

    Returns metrics and outputs of both models once all steps are done; else None.
    """
    models, seed = build(config), config.run.seed
    share = share_of(rollouts)
    assert models.critic is not None and models.reference is not None
    checkpoints = CheckpointFolder(folder, config, CheckpointConfig())
    learners: dict[str, Learner] = {"actor": models.actor, "critic": models.critic}
    resumed = checkpoints.resume(learners)
    if resumed is None:
        metrics, outputs = UpdateMetrics(), models.outputs(share)
    else:
        unfinished = Unfinished.from_checkpoint(resumed.state["unfinished"], resumed.tensor_files)
        assert unfinished.fits(RolloutPart(), share, config.ppo, seed)
        assert not unfinished.fits(RolloutPart(), share_of(rollouts[::-1]), config.ppo, seed)
        metrics, outputs = UpdateMetrics.from_state(unfinished.metrics), unfinished.outputs(share)
    under_way = UpdateUnderWay(share, outputs, metrics, config.ppo, seed)

    def stop_there() -> None:
        if under_way.num_updates == num_steps:
            raise Stopped

    try:
        models.updater.update(
            share,
            models.advantages(share, outputs),
            outputs,
            iteration=1,
            kl_coef=config.ppo.loss.kl_coef,
            metrics=metrics,
            before_step=stop_there,
        )
    except Stopped:
        checkpoints.save(0, learners, {"unfinished": under_way.state_dict()}, under_way.tensors())
        return None
    assert under_way.num_updates == NUM_STEPS
    return metrics.means() | models.token_outputs(share)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param({"distributed_optimizer": True}, id="dp2"),
        pytest.param({"pp": 2}, id="pp2", marks=pytest.mark.slow),
    ],
)
def test_an_update_in_pieces_is_the_update(tmp_path: Path, layout: dict[str, Any]) -> None:
    config, rollouts = make_config(save_models(tmp_path), **copy.deepcopy(VARIANT)), make_rollouts()
    for name, value in layout.items():
        setattr(config.parallel, name, value)

    def run(folder: str, num_steps: int) -> list[Any]:
        return run_distributed_test(train_up_to, 2, config, rollouts, tmp_path / folder, num_steps, timeout_s=120)

    through = run("through", NUM_STEPS + 1)
    # In the middle of the critic's two steps, and between critic and actor in the second pass.
    for num_steps in (1, 8):
        assert run("pieces", num_steps) == [None, None]
    for ours, theirs in zip(run("pieces", NUM_STEPS + 1), through, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert torch.equal(torch.as_tensor(ours[name]), torch.as_tensor(value)), name


def test_a_kill_while_a_checkpoint_takes_the_place_of_another_leaves_one_of_them(tmp_path: Path) -> None:
    """Within an iteration, checkpoints have the same number."""
    config = make_config(save_models(tmp_path), {"advantage": {"baseline": "grpo"}})
    folder = tmp_path / "checkpoints"

    def resumed_state(checkpoints: CheckpointFolder, actor: Learner) -> dict[str, Any]:
        resumed = checkpoints.resume({"actor": actor})
        assert resumed is not None and resumed.iteration == 3 and [*load_file(resumed.tensor_files[0])] == ["x"]
        return resumed.state | {"x": load_file(resumed.tensor_files[0])["x"].tolist()}

    def save_twice(kill: bool) -> dict[str, Any]:
        actor = build(config).actor
        checkpoints = checkpoint_folder(folder, Path(config.model.hf))
        checkpoints.save(3, {"actor": actor}, {"save": 1}, {"x": torch.ones(2)})
        move = checkpoint_module.move

        def kill_before_the_new_one(source: Path, target: Path) -> None:
            if kill and source.name == ".iter_0000003.tmp":
                os.kill(os.getpid(), signal.SIGKILL)
            move(source, target)

        checkpoint_module.move = kill_before_the_new_one
        checkpoints.save(3, {"actor": actor}, {"save": 2}, {"x": torch.zeros(2)})
        return resumed_state(checkpoints, actor)

    def resume() -> dict[str, Any]:
        actor = build(config).actor
        return resumed_state(checkpoint_folder(folder, Path(config.model.hf)), actor)

    with pytest.raises(RanksFailed, match="exit code -9"):
        run_distributed_test(save_twice, 1, True)
    assert run_distributed_test(resume, 1) == [{"save": 1, "x": [1.0, 1.0]}]
    assert run_distributed_test(save_twice, 1, False) == [{"save": 2, "x": [0.0, 0.0]}]
    assert (
        [path.name for path in folder.iterdir()] == ["iter_0000003"] == [p.name for p in complete_checkpoints(folder)]
    )
