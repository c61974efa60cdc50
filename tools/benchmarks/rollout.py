"""Generation through a server at 64 and 256 concurrent requests with log-probs, compared with vLLM in the process.

Rounds alternate between the two, so that both meet the same disturbances. Processor seconds say where time goes:
in the client, in the HTTP server's process, in the engine's core.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from megatron_vcppo.records import Prompt
from megatron_vcppo.rollout import engine_http, messages
from megatron_vcppo.rollout.client import RolloutClient
from megatron_vcppo.rollout.engine_command import Placement, environment
from megatron_vcppo.rollout.messages import Sampling
from megatron_vcppo.run.processes import without_trainer
from megatron_vcppo.run.secret import read_secret
from megatron_vcppo.tasks.word_tokenizer import build_tokenizer
from tools.benchmarks._rollout_node import MAX_LENGTH, RolloutNode, make_prompts, save_policy


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmark."""
    parser.add_argument("--concurrency", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=MAX_LENGTH - 32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vllm-route", action="store_true", help="also vLLM's own /v1/completions, a call per request")


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One case per concurrency; ratio: server over in-process, the median of the rounds' ratios."""
    with tempfile.TemporaryDirectory(prefix="bench_rollout_") as name:
        folder = Path(name)
        sizes = {"hidden_size": args.hidden, "intermediate_size": 2 * args.hidden, "num_hidden_layers": args.layers}
        model = save_policy(folder / "model", **sizes)
        engine = {"max_num_seqs": max(args.concurrency)}
        with RolloutNode(folder / "node", model, {"engine": engine}) as node, InProcess(model, node) as in_process:
            node.wait(1)
            in_process.wait()
            decode = build_tokenizer().decode
            client = RolloutClient(node.rendezvous, node.settings, MAX_LENGTH, 0, decode)
            client.config.max_tokens = args.new_tokens
            for concurrency in args.concurrency:
                yield measure(args, node, client, in_process, make_prompts(concurrency, args.prompt_tokens))


def measure(
    args: argparse.Namespace, node: RolloutNode, client: RolloutClient, in_process: "InProcess", prompts: list[Prompt]
) -> dict[str, Any]:
    """Alternate rounds at one concurrency; the first round warms up."""
    rounds: list[tuple[Any, ...]] = []
    for round_number in range(args.rounds + 1):
        seeded = in_process.generate(prompts, args.new_tokens, seeded=True)
        unseeded = in_process.generate(prompts, args.new_tokens, seeded=False)
        server = through_server(node, client, prompts)
        route = vllm_route(node, prompts, args.new_tokens) if args.vllm_route else 0.0
        if round_number:
            rounds.append((seeded, unseeded, server, route))
    num_tokens = len(prompts) * args.new_tokens

    def rate(index: int) -> float:
        return round(num_tokens / statistics.median(r[index]["seconds"] for r in rounds))

    case = {
        "concurrency": len(prompts),
        "new_tokens": args.new_tokens,
        "in_process_tokens_per_s": rate(0),
        "in_process_unseeded_tokens_per_s": rate(1),
        "server_tokens_per_s": rate(2),
        "ratio": round(statistics.median(r[0]["seconds"] / r[2]["seconds"] for r in rounds), 3),
        "ratio_to_unseeded": round(statistics.median(r[1]["seconds"] / r[2]["seconds"] for r in rounds), 3),
        "cpu_s": {
            "in_process": round(statistics.median(r[0]["cpu_s"] for r in rounds), 2),
            **{part: round(statistics.median(r[2][part] for r in rounds), 2) for part in ("client", "http", "core")},
        },
    }
    if args.vllm_route:
        case["vllm_route_tokens_per_s"] = round(num_tokens / statistics.median(r[3] for r in rounds))
    return case


def through_server(node: RolloutNode, client: RolloutClient, prompts: list[Prompt]) -> dict[str, float]:
    """One iteration's generation by the client, and the processor seconds of each part."""
    server = psutil.Process(node.engines()[0].pid)
    parts = {"http": [server], "core": server.children(recursive=True)}

    def cpu_s(part: str) -> float:
        return sum(sum(process.cpu_times()[:2]) for process in parts[part])

    before = {part: cpu_s(part) for part in parts}
    began, cpu_began = time.perf_counter(), time.process_time()
    rollouts = client.generate(prompts, 0, messages.NO_VERSION, Sampling(ignore_eos=True), 1)
    seconds = time.perf_counter() - began
    assert all(len(rollout.response_ids) == client.config.max_tokens for rollout in rollouts)
    used = {part: cpu_s(part) - before[part] for part in parts}
    return {"seconds": seconds, "client": time.process_time() - cpu_began, **used}


def vllm_route(node: RolloutNode, prompts: list[Prompt], new_tokens: int) -> float:
    """Seconds of the same work through vLLM's own OpenAI route, one call per request, with token ids and log-probs."""

    async def generate() -> None:
        async with engine_http.open_session(read_secret(node.rendezvous / "secret")) as session:

            async def one(index: int, prompt: Prompt) -> None:
                body = {"model": "policy", "prompt": list(prompt.token_ids), "max_tokens": new_tokens, "seed": index,
                        "ignore_eos": True, "logprobs": 0, "return_token_ids": True}  # fmt: skip
                engine, no_limit = node.engines()[0], aiohttp.ClientTimeout(total=None)
                async with session.ask(engine, "POST", "/v1/completions", body, no_limit) as reply:
                    await reply.json()

            await asyncio.gather(*(one(index, prompt) for index, prompt in enumerate(prompts)))

    began = time.perf_counter()
    asyncio.run(generate())
    return time.perf_counter() - began


class InProcess:
    """vLLM's LLM class in a child process, under the same environment as an engine."""

    def __init__(self, model: Path, node: RolloutNode) -> None:
        engine = node.settings.engine
        variables = environment(without_trainer(os.environ), engine, Placement(), Path("unused"), "lo")
        script = Path(__file__).with_name("_in_process_vllm.py")
        arguments = [sys.executable, str(script), str(model), str(MAX_LENGTH), str(engine.max_num_seqs), "float32"]
        self.child = subprocess.Popen(
            arguments, env=variables, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=(node.folder / "in_process.log").open("w"),
        )  # fmt: skip

    def __enter__(self) -> "InProcess":
        return self

    def __exit__(self, *_: object) -> None:
        assert self.child.stdin
        self.child.stdin.close()
        self.child.kill()
        self.child.wait(30)

    def wait(self) -> None:
        """Until it is ready."""
        assert self.child.stdout
        line = self.child.stdout.readline()
        assert line == "ready\n", f"in-process vLLM did not start: {line!r}"

    def generate(self, prompts: list[Prompt], max_tokens: int, seeded: bool) -> dict[str, float]:
        """seconds and cpu_s of one generate call."""
        assert self.child.stdin and self.child.stdout
        task = {"prompts": [prompt.token_ids for prompt in prompts], "max_tokens": max_tokens, "seeded": seeded}
        self.child.stdin.write(json.dumps(task) + "\n")
        self.child.stdin.flush()
        return json.loads(self.child.stdout.readline())
