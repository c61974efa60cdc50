"""A vLLM engine under our server: start, push, greedy answers; and vLLM's sleep and wake, which free the GPU."""

import importlib
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from tools.gpu_check.child import call
from tools.gpu_check.rows import Row, at_least, skipped

SLEEP_TIMEOUT_S = 300.0


def run(target: str, size: str) -> list[Row]:
    """Our server first, then vLLM alone: each gives the card back before the other takes it."""
    with tempfile.TemporaryDirectory(prefix="gpu_check_engine_") as name:
        rows = pushed(Path(name), target)
        if target == "cpu":
            return [*rows, skipped("sleep and wake", "vLLM on a CPU has neither")]
        rows += call("tools.gpu_check.engine:asleep", SLEEP_TIMEOUT_S, model=Path(name) / "model_0")
        return rows


def pushed(folder: Path, target: str) -> list[Row]:
    """Greedy answers follow the pushed weights: those of another model, then the first ones again.

    Over the file system: NCCL takes no two processes of one GPU (tests/gpu has a stream over NCCL).
    """
    from megatron_vcppo.weight_sync.transport import DiskTransport
    from tools.benchmarks._rollout_node import RolloutNode, make_prompts, save_policy, weights_of

    models = [save_policy(folder / f"model_{seed}", "qwen2", tied=True, seed=seed) for seed in range(2)]
    began = time.monotonic()
    with RolloutNode(folder / "node", models[0], {"engine": {"per_node": 1, "max_num_seqs": 16}}) as node:
        node.wait(1)
        rows = [Row("engine ready", f"{time.monotonic() - began:.0f} s")]
        sync = node.weight_sync(120.0, DiskTransport(folder / "weights", 1 << 20))
        answers, seconds = [], []
        for version, model in enumerate((models[0], models[1], models[0])):
            seconds.append(sync.sync(version, weights_of(model)).seconds)
            answers.append(node.greedy(version, make_prompts(4)))
    good = answers[0] == answers[2] and answers[0] != answers[1]
    result = f"{max(seconds):.2f} s a push" if good else f"answers {answers}"
    return [*rows, Row("pushes over the file system change the answers", result, "and back", "ok" if good else "FAIL")]


def asleep(model: Path) -> list[Row]:
    """In a child: both levels of sleep free most of what the engine took; after level 1 it answers as before."""
    answers, free = vllm_cycle(model)
    rows = []
    taken = free["before"] - free["awake"]
    for level in (1, 2):
        share = (free[f"level {level}"] - free["awake"]) / taken
        rows.append(at_least(f"sleep level {level}, share of {taken / 2**30:.1f} GiB that is freed", share, 0.8))
    same = answers[0] == answers[1]
    rows.append(Row("answers after sleep level 1", "the same" if same else str(answers), "the same",
                    "ok" if same else "FAIL"))  # fmt: skip
    return rows


def vllm_cycle(model: Path) -> tuple[list[Any], dict[str, int]]:
    """Greedy answers before and after a sleep, and free bytes of the GPU at each point; in this process."""
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR")
    import torch

    vllm = importlib.import_module("vllm")  # the package imports it in rollout/ only; this is not the package
    free = {"before": torch.cuda.mem_get_info()[0]}
    llm = vllm.LLM(model=str(model), enable_sleep_mode=True, enforce_eager=True, gpu_memory_utilization=0.3,
                   max_model_len=256, dtype="bfloat16")  # fmt: skip
    prompts = [{"prompt_token_ids": list(range(4, 20))}]
    greedy = vllm.SamplingParams(temperature=0.0, max_tokens=16, detokenize=False)

    def answer() -> list[int]:
        return list(llm.generate(prompts, greedy, use_tqdm=False)[0].outputs[0].token_ids)

    answers = [answer()]
    free["awake"] = torch.cuda.mem_get_info()[0]
    for level in (1, 2):
        llm.sleep(level=level)
        free[f"level {level}"] = torch.cuda.mem_get_info()[0]
        llm.wake_up()
        if level == 1:
            answers.append(answer())
    return answers, free
