"""A checkpoint of adapters holds these, heads and moments, points to the base, and resumes under any layout."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader

from megatron_vcppo.config import Config, LoraConfig, ModelConfig, ParallelConfig
from megatron_vcppo.data.packing import pack_all, rounding
from megatron_vcppo.errors import UserError
from megatron_vcppo.hf.adapter_base import base_of_hf, locate
from megatron_vcppo.hf.adapters import StoredAdapters
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.mcore.hf_weights_io import stream_hf
from megatron_vcppo.mcore.learner import FrozenValues, Reference
from megatron_vcppo.mcore.model import build_actor, build_critic
from megatron_vcppo.mcore.starting_weights import load_component
from megatron_vcppo.run.folder import StageFolder
from megatron_vcppo.run.manifest import read_manifest
from megatron_vcppo.stages import model_rewards
from tests.helpers.checkpoints import checkpoint_folder
from tests.helpers.distributed import run_distributed_test
from tests.helpers.lora import LORA, start_with_adapters
from tests.helpers.training import make_sequences, step, train
from tools.benchmarks._tiny_models import save_tiny_model

TP2 = ParallelConfig(tp=2, dp=1, sequence_parallel=True)


def continued(hf: Path, folder: Path, parallel: ParallelConfig, steps: range, lora: LoraConfig = LORA) -> list:
    """Losses and gradient norms of these steps of actor and critic; saved after the second one."""
    actor, critic = start_with_adapters(hf, parallel, lora)
    learners = {"actor": actor, "critic": critic}
    checkpoints = checkpoint_folder(folder, hf)
    if steps.start:
        resumed = checkpoints.resume(learners)
        assert resumed is not None and resumed.iteration == steps.start
    history = []
    for number in steps:
        history += [step(learner, parallel, number) for learner in (actor, critic)]
        if number == 1:
            checkpoints.save(2, learners, {})
    return history


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list]:
    """The model, checkpoints of two steps on tp 2, and four steps without a break."""
    folder = tmp_path_factory.mktemp("lora")
    hf = save_tiny_model(folder / "hf")
    return (
        hf,
        folder / "run" / "ppo" / "checkpoints",
        run_distributed_test(continued, 2, hf, folder / "run" / "ppo" / "checkpoints", TP2, range(4))[0],
    )


@pytest.mark.parametrize(
    "parallel",
    [TP2, ParallelConfig(pp=2, dp=1), ParallelConfig(dp=2, distributed_optimizer=True)],
    ids=["tp2", "pp2", "dp2-distributed"],
)
def test_training_resumes_under_another_layout(saved: tuple[Path, Path, list], parallel: ParallelConfig) -> None:
    hf, folder, expected = saved
    for history in run_distributed_test(continued, 2, hf, folder, parallel, range(2, 4)):
        for ours, theirs in zip(history, expected[4:], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5)


def test_a_checkpoint_has_no_base(saved: tuple[Path, Path, list]) -> None:
    hf, folder, _ = saved
    for name in ("actor", "critic"):
        component = folder / "iter_0000002" / name
        keys = FileSystemReader(component).read_metadata().state_dict_metadata
        weights = {key for key in keys if not key.startswith("optimizer.")}
        heads = {"value_head.weight", "value_head.bias"} if name == "critic" else set()
        assert {key for key in weights if ".lora." not in key} == heads
        assert len(weights - heads) == 2 * 7 and len(keys) == 3 * len(weights), "two moments of each"
        stored = StoredAdapters.of_manifest(component, read_manifest(component)["meta"])
        assert stored is not None and stored.matches(LORA)
        assert stored.base == base_of_hf(hf)


def test_a_component_loads_into_a_model_of_its_kind(saved: tuple[Path, Path, list]) -> None:
    """An actor as it was saved; a critic on the actor's adapters, as value pretraining starts after SFT."""
    hf, folder, _ = saved

    def body() -> tuple[bool, bool, bool]:
        actor, critic = start_with_adapters(hf, ParallelConfig())
        checkpoint_folder(folder, hf).resume({"actor": actor, "critic": critic})
        config = ModelConfig(hf=str(hf), dtype="float32", lora=LORA)
        again, value = build_actor(actor.model.arch, config, ParallelConfig()), critic.model
        load_component(again, folder / "iter_0000002" / "actor", hf)
        pushed = [dict(stream_hf(model)) for model in (actor.model, again)]
        fresh = build_critic(actor.model.arch, config, ParallelConfig())
        head = fresh.value_head.weight.clone()
        load_component(fresh, folder / "iter_0000002" / "actor", hf, without_head=True, owner=again)
        trunk = dict(stream_hf(fresh))
        different = any(not torch.equal(trunk[name], tensor) for name, tensor in stream_hf(value))
        return (
            all(torch.equal(pushed[0][name], tensor) for name, tensor in pushed[1].items()),
            all(torch.equal(pushed[0][name], tensor) for name, tensor in trunk.items()) and different,
            torch.equal(fresh.value_head.weight, head),
        )

    assert run_distributed_test(body, 1)[0] == (True, True, True)


def test_all_weights_are_a_base(tmp_path: Path) -> None:
    """Adapters on what a stage without them left: its component is the base, also for a critic, also once moved."""
    hf = save_tiny_model(tmp_path / "hf")
    checkpoints = tmp_path / "run" / "sft" / "checkpoints"
    run_distributed_test(train, 1, hf, checkpoints, ParallelConfig(), range(1), save_at=1)
    full, later = checkpoints / "iter_0000001" / "actor", tmp_path / "run" / "ppo" / "checkpoints"

    def logprobs(folder: Path, lora: LoraConfig) -> list[torch.Tensor]:
        start_with_adapters(hf, ParallelConfig())
        config = ModelConfig(hf=str(hf), dtype="float32", lora=lora)
        model = build_actor(Architecture.from_hf(hf), config, ParallelConfig())
        load_component(model, folder, hf)
        return Reference(model).logprobs(pack_all(make_sequences(5), 160, *rounding(ParallelConfig())))

    def save() -> None:
        actor, critic = start_with_adapters(hf, ParallelConfig())
        load_component(actor.model, full, hf)
        load_component(critic.model, full, hf, without_head=True)
        base = actor.model.base
        assert base is not None and base == critic.model.base and base.kind == "checkpoint"
        checkpoint_folder(later, hf).save(1, {"actor": actor}, {})

    plain = run_distributed_test(logprobs, 1, full, LoraConfig())[0]
    run_distributed_test(save, 1)
    (tmp_path / "run").rename(tmp_path / "moved")
    component = tmp_path / "moved" / "ppo" / "checkpoints" / "iter_0000001" / "actor"
    for ours, theirs in zip(run_distributed_test(logprobs, 1, component, LORA)[0], plain, strict=True):
        assert torch.equal(ours, theirs), "new adapters add nothing"


def refusal(run: Callable[..., object], *arguments: object) -> str:
    def body() -> str:
        try:
            run(*arguments)
        except UserError as error:
            return str(error)
        return "nothing"

    return run_distributed_test(body, 1)[0]


def test_other_adapters_are_refused(saved: tuple[Path, Path, list]) -> None:
    hf, folder, _ = saved
    other = LoraConfig(rank=8, alpha=8.0)
    text = refusal(continued, hf, folder, ParallelConfig(), range(2, 3), other)
    assert "has adapters of model.lora.rank=4 model.lora.alpha=8" in text and "\n" not in text
    assert "model.lora.rank=4" in refusal(train, hf, folder, ParallelConfig(), range(2, 3)), "a model without any"


def test_adapters_are_refused_on_other_weights(saved: tuple[Path, Path, list], tmp_path: Path) -> None:
    _, folder, _ = saved
    other = save_tiny_model(tmp_path / "other", seed=1)
    text = refusal(continued, other, folder, ParallelConfig(), range(2, 3))
    assert "its adapters belong to the weights that were in" in text and str(other) in text


def test_a_base_is_known_by_its_weights(tmp_path: Path) -> None:
    """It may lie elsewhere; a change of one number in any tensor's first bytes makes it another."""
    hf = save_tiny_model(tmp_path / "hf")
    base = base_of_hf(hf)
    moved = Path(shutil.move(hf, tmp_path / "moved"))
    component = tmp_path / "run" / "ppo" / "checkpoints" / "iter_0000001" / "actor"
    assert locate(base, component, moved) == moved
    with pytest.raises(UserError, match="its adapters belong to the weights that were in"):
        locate(base, component, None)
    tensors = load_file(moved / "model.safetensors")
    tensors["model.layers.3.mlp.down_proj.weight"][0, 0] += 0.5
    save_file(tensors, moved / "model.safetensors")
    with pytest.raises(UserError, match="moved has other weights"):
        locate(base, component, moved)


def test_a_reward_model_may_have_adapters_where_the_policy_has_none(tmp_path: Path) -> None:
    hf = save_tiny_model(tmp_path / "hf")
    config = Config()
    config.run.dir, config.model.hf, config.model.dtype = str(tmp_path / "run"), str(hf), "float32"
    config.rewards.model.stage = "reward_model"
    stage = StageFolder(tmp_path / "run" / "reward_model")

    def body() -> tuple[torch.Tensor, torch.Tensor]:
        _, critic = start_with_adapters(hf, ParallelConfig())
        step(critic, ParallelConfig(), 0)
        checkpoint_folder(stage.checkpoints, hf).save(1, {"critic": critic}, {})
        stage.mark_done(checkpoint=stage.checkpoint(1))
        microbatches = pack_all(make_sequences(5), 160, *rounding(ParallelConfig()))
        frozen = FrozenValues(model_rewards.load(config))
        return torch.cat(critic.values(microbatches)), torch.cat(frozen.values(microbatches))

    trained, loaded = run_distributed_test(body, 1)[0]
    assert torch.equal(trained, loaded) and trained.std() > 0
