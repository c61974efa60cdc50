"""Keys that no other test sets: what each of them changes."""

import itertools
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open

from megatron_vcppo.config import CodeRewardConfig, Config, ModelConfig, ParallelConfig
from megatron_vcppo.data.tokenizer import load_tokenizer
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.hf.convert.importer import import_hf
from megatron_vcppo.launch.local_chain import local_processes
from megatron_vcppo.mcore import runtime
from megatron_vcppo.mcore.model import build_critic
from megatron_vcppo.records import Prompt
from megatron_vcppo.rewards.registry import resolve_verifiers
from megatron_vcppo.rollout.node import plan_slots
from megatron_vcppo.run.folder import RunFolder
from megatron_vcppo.run.manifest import write_manifest
from megatron_vcppo.slurm.submission import resolve_python
from megatron_vcppo.stages import export
from megatron_vcppo.stages.held_out import evaluation_prompts
from megatron_vcppo.stages.rollout_session import RolloutSession
from megatron_vcppo.stages.sft import load_datasets, mixture_of
from megatron_vcppo.tasks.base_model import write_base_model
from megatron_vcppo.weight_sync.push_plan import SINGLE
from megatron_vcppo.weight_sync.rank_role import make_weight_sync, role_of
from megatron_vcppo.weight_sync.transport import DiskTransport, NetworkTransport
from tests.helpers.distributed import run_distributed_test
from tools.benchmarks._tiny_chains import tiny_config
from tools.benchmarks._tiny_models import save_tiny_model


def test_init_std_scales_a_new_head(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path)

    def body() -> list[torch.Tensor]:
        runtime.start(ParallelConfig(), 3, 60)
        heads = []
        for init_std in (0.02, 0.5):
            torch.manual_seed(3)
            model = ModelConfig(hf=str(folder), dtype="float32", init_std=init_std)
            heads.append(build_critic(Architecture.from_hf(folder), model, ParallelConfig()).value_head.weight.detach())
        return heads

    narrow, wide = run_distributed_test(body, 1)[0]
    assert torch.allclose(wide, narrow * 25, rtol=1e-5) and float(narrow.abs().max()) > 0


@pytest.mark.parametrize(("memory_mib", "correct"), [(64, False), (1024, True)])
def test_memory_mib_limits_a_program(memory_mib: int, correct: bool) -> None:
    verifier: Any = resolve_verifiers({}, CodeRewardConfig(isolation="none", memory_mib=memory_mib))["code"]
    answer = json.dumps({"inputs": [""], "outputs": ["300000000\n"]})
    verdict = verifier(Prompt("p", (1,), "", answer, "code"), "```python\nprint(len(bytes(300_000_000)))\n```")
    verifier.close()
    assert (verdict.reward > 0) == correct, verdict


def test_engine_keys_reach_the_engines_command_environment_and_supervisor(tmp_path: Path) -> None:
    config = Config()
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"head_dim": 64}')
    engine = config.rollout.engine
    engine.dp, engine.dtype, engine.cpu_cache_gib, engine.sleep_level = 2, "float32", 3, 1
    engine.extra_args, config.rollout.max_restarts = ["--max-log-len", "7"], 4
    config.rollout.turn_timeout_s = 77.0
    (tmp_path / "rendezvous").mkdir()
    (slot,) = plan_slots(config, model, tmp_path / "rendezvous", node=0)
    command, environment = slot.launch(1234)
    options = dict(itertools.pairwise(command))
    assert (options["--data-parallel-size"], options["--dtype"]) == ("2", "float32")
    assert command[-2:] == ["--max-log-len", "7"] and environment["VLLM_CPU_KVCACHE_SPACE"] == "3"
    assert (slot.sleep_level, slot.limits.max_restarts, slot.limits.turn_timeout_s) == (1, 4, 77.0)


@pytest.mark.parametrize(("transport", "expected"), [("disk", DiskTransport), ("network", NetworkTransport)])
def test_transport_chooses_how_weights_travel(transport: Any, expected: type, tmp_path: Path) -> None:
    config = Config()
    config.weight_sync.transport = transport
    sync = make_weight_sync(config, tmp_path, SINGLE, torch.device("cpu"))
    assert isinstance(sync.transport, expected)


def test_max_senders_bounds_the_senders_of_a_push() -> None:
    config, place = Config(), {"pp_rank": 0, "pp_size": 1, "tp_rank": 1, "tp_size": 2, "dp_rank": 0, "dp_size": 1}
    runtime: Any = SimpleNamespace(**place, cp_rank=0, cp_size=1, ep_size=1)
    assert role_of(runtime, config.weight_sync.max_senders).is_sender
    config.weight_sync.max_senders = 1
    assert not role_of(runtime, config.weight_sync.max_senders).is_sender


def test_verify_reaches_the_transport(tmp_path: Path) -> None:
    config = Config()
    config.weight_sync.verify = True
    transport: Any = make_weight_sync(config, tmp_path, SINGLE, torch.device("cpu")).transport
    assert transport.verify


def test_num_prompts_is_the_number_of_problems_evaluated() -> None:
    config, found = Config(), [Prompt(f"p{i}", (1,), "", "", "t") for i in range(5)]
    config.prompts.test = "test.jsonl"
    session: Any = SimpleNamespace(prompts=lambda source: found)
    assert evaluation_prompts(config, session) == found
    config.evaluate.num_prompts = 2
    assert evaluation_prompts(config, session) == found[:2]


@pytest.mark.parametrize(("dtype", "stored"), [(None, "F32"), ("bfloat16", "BF16")])
def test_export_dtype(dtype: Any, stored: str, tmp_path: Path) -> None:
    config = Config(stages=["sft", "export"])
    config.run.dir, config.model.hf = str(tmp_path / "run"), str(save_tiny_model(tmp_path / "base"))
    config.export.dtype, config.export.verify_logits = dtype, False
    iteration = tmp_path / "run" / "sft" / "checkpoints" / "iter_0000003"
    import_hf(Path(config.model.hf), iteration / "actor", 2, 1)
    write_manifest(iteration, {"iteration": 3})
    RunFolder(tmp_path / "run").stage("sft").mark_done(checkpoint=iteration)
    export.run(config)
    with safe_open(tmp_path / "run" / "export" / "hf" / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {stored}  # noqa: SIM118


def test_the_clusters_python_and_restarts_reach_the_roles(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, ("sft", "evaluate"))
    config.cluster.python, config.cluster.rollout_restarts = "/opt/python", 3
    units = local_processes(RunFolder(tmp_path), config, "evaluate", resolve_python(config))
    assert {unit.command[0] for unit in units} == {"/opt/python"}
    assert [unit.restarts for unit in units if unit.role == "rollout"] == [3]


def test_keys_of_prompts_reach_what_the_model_reads(tmp_path: Path) -> None:
    config = Config()
    config.model.hf, config.model.max_length = str(tmp_path / "model"), 64
    write_base_model(tmp_path / "model")
    for name in ("a", "b"):
        row = {"prompt": f"{len(name)} ?", "response": "= 1", "answer": "1", "task": "math"}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    config.sft.train = config.prompts.train = str(tmp_path / "a.jsonl")
    config.sft.mix = {str(tmp_path / "b.jsonl"): 2.0}
    config.prompts.mix, config.prompts.template = {str(tmp_path / "b.jsonl"): 3.0}, "5 {prompt} 6"
    config.prompts.system, config.prompts.apply_chat_template = "7", True
    config.prompts.chat_template_kwargs = {"bos_token": "<unk>"}
    tokenizer = load_tokenizer(config.model.hf)
    session: Any = SimpleNamespace(config=config, tokenizer=tokenizer, verifiers=["math"], _prompts={})
    session.runtime, session.verifiers = SimpleNamespace(is_main=False), resolve_verifiers({}, config.rewards.code)
    session.prompts = partial(RolloutSession.prompts, session)
    prompts = RolloutSession.training_prompts(session, seed=0).next(4)
    assert sorted(prompt.prompt_id for prompt in prompts) == ["a:1@0", "b:1+1@0", "b:1+2@0", "b:1@0"]
    assert len(prompts) == 4 and {tokenizer.decode(prompt.token_ids) for prompt in prompts} == {"<unk> 7 5 1 ? 6"}

    def body() -> int:
        runtime.start(ParallelConfig(), 3, 60)
        train, _ = load_datasets(config, RunFolder(tmp_path / "run").stage("sft"))
        assert tokenizer.decode(train[0].token_ids) == "<unk> 7 5 1 ? 6 = 1 <eos>"
        return mixture_of(config, train).num_samples

    assert run_distributed_test(body, 1)[0] == 3
