"""PPO iterations of ``vcppo run`` compared with TRL's PPOTrainer on CPU: samples/s of both, per phase, and their ratio.

The same Hugging Face model as actor, one of the same size as critic, the same prompts (token ids), response lengths,
PPO epochs and minibatches, float32, the same cores; ``--case`` chooses sizes and lengths. Ours runs on the layout that
suits few cores, a replica and an engine on each (``--set`` changes it). TRL gets its own environment, made at the first
call, and is measured with each requested number of threads; its best counts. Rounds alternate between the sides; the
first iteration of each run, which compiles and connects, is not counted. The machine must be idle: where another
process takes a core, TRL's threads wait for each other and it falls behind by far more than its share.
"""

import argparse
import contextlib
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from megatron_vcppo.run.metrics_log import read_metrics
from tools.benchmarks._long_tail import Lengths, run_stage

CASES: dict[str, dict[str, int]] = {
    "small": {"width": 64, "head_size": 32, "layers": 2, "batch": 128, "new_tokens": 130},
    "eos": {"width": 512, "head_size": 64, "layers": 5, "batch": 32, "new_tokens": 384},
    "tail": {"width": 64, "head_size": 32, "layers": 2, "batch": 128, "new_tokens": 800},
}
"""Sizes of model and batch. small: 0.15 M parameters, all responses as long; eos: 21 M; tail: as small."""
LENGTHS = {
    "eos": Lengths(mean=128, share=0.0, pinned=False, longest=384),
    "tail": Lengths(mean=80, share=0.01, pinned=False),
}
"""Of responses, on both sides, in the cases that have given ones."""
ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "requirements-cpu.lock"
PACKAGES = ("torch", "transformers", "datasets", "accelerate==1.15.0", "trl==1.12.0")
"""What TRL's side needs; the lock pins what is not pinned here. TRL 1.12 is the last release with PPOTrainer."""
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
LEARNING_RATE = 3e-6
"""TRL's default, so small that responses keep their length on both sides."""
TIMEOUT_S = 3600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Environment, model, lengths."""
    parser.add_argument(
        "--case",
        choices=list(CASES),
        default="small",
        help="small: 0.15 M parameters, responses of one length; eos: 21 M parameters, responses that end after 128 "
        "tokens on average, at most 384; tail: 0.15 M, 1 %% of the responses ten times as long as the mean (small)",
    )
    parser.add_argument("--environment", type=Path, default=ROOT / ".venv-trl", help="TRL's; made if it is not there")
    parser.add_argument("--hf", type=Path, help="folder of a Hugging Face model; default: the demo's base model")
    parser.add_argument("--width", type=int, help="of the model that is made without --hf; default: the case's")
    parser.add_argument("--head-size", type=int, help="of that model; default: the case's")
    parser.add_argument("--layers", type=int, help="of that model; default: the case's")
    parser.add_argument("--batch", type=int, help="rollouts per iteration; default: the case's")
    parser.add_argument("--new-tokens", type=int, help="tokens of the longest response; default: the case's")
    parser.add_argument("--until-eos", action="store_true", help="responses end at the end token: needs a trained --hf")
    parser.add_argument("--minibatches", type=int, default=4)
    parser.add_argument("--ppo-epochs", type=int, default=1)
    parser.add_argument("--iterations", type=int, default=5, help="timed, after one that is not (5)")
    parser.add_argument("--rounds", type=int, default=2, help="runs of either side, in turns (2)")
    parser.add_argument("--cores", type=int, default=2, help="that both sides run on (2)")
    parser.add_argument("--trl-threads", type=int, nargs="+", default=[1, 2], help="each is measured (1 2)")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="our configuration")


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One case per side and round, then the ratios."""
    for name, value in CASES[args.case].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    python = make_environment(args.environment)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    with tempfile.TemporaryDirectory(prefix="bench_ppo_peer_") as name:
        folder = Path(name)
        task = make_task(args, folder / "task")
        sides: dict[str, Callable[[], list[dict[str, float]]]] = {"ours": partial(ours, args, folder, *task)}
        for threads in args.trl_threads:
            sides[f"trl, threads {threads}"] = partial(theirs, args, python, threads, folder, *task)
        rates: dict[str, list[float]] = {side: [] for side in sides}
        for round_number in range(1, args.rounds + 1):
            for side, measure in sides.items():
                load = os.getloadavg()[0]
                iterations = measure()[1:]
                rates[side].append(args.batch / statistics.fmean(record["iteration"] for record in iterations))
                yield {"case": side, "round": round_number, "load_before": round(load, 1), **case(args, iterations)}
    medians = {side: statistics.median(rates[side]) for side in sides}
    best = max((side for side in sides if side != "ours"), key=lambda side: medians[side])
    pairs = zip(rates["ours"], rates[best], strict=True)
    yield {
        "case": "ratio",
        "samples_per_s": {side: round(median, 2) for side, median in medians.items()},
        "ours_over_best_trl": round(medians["ours"] / medians[best], 2),
        "of_rounds": [round(mine / trls, 2) for mine, trls in pairs],
    }


def case(args: argparse.Namespace, iterations: list[dict[str, float]]) -> dict[str, Any]:
    """The mean iteration. iterations: seconds by phase, "iteration" (all of it) and "tokens" (of responses)."""
    mean = {name: statistics.fmean(record.get(name, 0.0) for record in iterations) for name in iterations[-1]}
    iteration_s, tokens = mean.pop("iteration"), mean.pop("tokens")
    return {
        "iterations": len(iterations),
        "samples_per_s": round(args.batch / iteration_s, 2),
        "response_tokens_per_s": round(tokens / iteration_s),
        "response_length": round(tokens / args.batch, 1),
        "iteration_s": round(iteration_s, 3),
        "seconds": {name: round(seconds, 3) for name, seconds in mean.items()},
    }


def make_environment(folder: Path) -> Path:
    """TRL's environment; returns its Python. Made again when a pin changed."""
    python, stamp = folder / "bin" / "python", folder / "bench.stamp"
    wanted = hashlib.sha256(" ".join(PACKAGES).encode() + LOCK.read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"bench: installing {', '.join(PACKAGES)} into {folder}", file=sys.stderr)
    venv.create(folder, clear=True, with_pip=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", str(LOCK)]
    at_hand = subprocess.run([*pip, "--dry-run", "--no-deps", "torch"], capture_output=True).returncode == 0
    subprocess.run([*pip, *([] if at_hand else ["--extra-index-url", TORCH_INDEX]), *PACKAGES], check=True)
    stamp.write_text(wanted)
    return python


def make_task(args: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    """Model and prompts, each to be used once: their paths."""
    count = str((args.iterations + 1) * args.batch)
    sizes = [f"--{key.replace('_', '-')}={getattr(args, key)}" for key in ("width", "head_size", "layers")]
    sizes.append(f"--max-length={max(1024, args.new_tokens + 128)}")
    rows = ["--demonstrations", "1", "--validation", "1", "--test", "1", "--prompts", count]
    _vcppo(["make-task", "--out", str(folder), *sizes, *rows], folder.with_suffix(".log"))
    return args.hf or folder / "base_model", folder / "prompts_train.jsonl"


def ours(args: argparse.Namespace, folder: Path, hf: Path, prompts: Path) -> list[dict[str, float]]:
    """The demo's ppo stage, without the stages before it, with a replica and an engine per core."""
    run_folder = Path(tempfile.mkdtemp(prefix="run_", dir=folder))
    settings = {
        "run.dir": run_folder,
        "stages": "[ppo]",
        "parallel.pp": 1,
        "parallel.dp": args.cores,
        "parallel.tokens_per_microbatch": 4096,
        "model.hf": hf,
        "prompts.train": prompts,
        "rollout.max_tokens": args.new_tokens,
        "rollout.ignore_eos": not args.until_eos,
        "rollout.engine.max_num_seqs": args.batch,
        "rollout.engine.per_node": args.cores,  # most of a small model's step is Python, on one core
        "model.max_length": args.new_tokens + 128,
        "ppo.critic.init": "random_head",
        "ppo.optimizer.lr": LEARNING_RATE,
        "ppo.critic.optimizer.lr": LEARNING_RATE,
        "ppo.iterations": args.iterations + 1,
        "ppo.prompts_per_iteration": args.batch,
        "ppo.minibatches": args.minibatches,
        "ppo.ppo_epochs": args.ppo_epochs,
        "ppo.checkpoint.save_every": 1_000_000,
    }
    if args.case in LENGTHS:
        with contextlib.redirect_stdout(sys.stderr):  # one JSON line per case
            run_stage(run_folder, LENGTHS[args.case], settings, args.set)
    else:
        overrides = [f"{key}={value}" for key, value in settings.items()] + args.set
        _vcppo(["run", str(ROOT / "configs" / "demo" / "vcppo.yaml"), *overrides], run_folder.with_suffix(".log"))
    iterations = []
    for record in read_metrics(run_folder / "ppo"):
        seconds = {name[5:-2]: value for name, value in record.items() if name.startswith("time/")}
        iterations.append({**seconds, "tokens": record["rollout/tokens"]})
    return iterations


def theirs(
    args: argparse.Namespace, python: Path, threads: int, folder: Path, hf: Path, prompts: Path
) -> list[dict[str, float]]:
    """TRL in its environment, on the token ids that our side makes of the prompts."""
    from megatron_vcppo.data.prompts import load_prompts
    from megatron_vcppo.data.tokenizer import load_tokenizer

    loaded, _ = load_prompts(str(prompts), load_tokenizer(str(hf)), 128, known_tasks=["running_sum"])
    job = {
        "model": str(hf),
        "folder": str(folder / "trl"),
        "prompts": [prompt.token_ids for prompt in loaded],
        "threads": threads,
        "learning_rate": LEARNING_RATE,
        "lengths": [LENGTHS[args.case].of(seed) for seed in range(len(loaded))] if args.case in LENGTHS else None,
        "until_eos": args.until_eos or args.case in LENGTHS,
        **{key: getattr(args, key) for key in ("batch", "new_tokens", "minibatches", "ppo_epochs")},
    }
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TRL_EXPERIMENTAL_SILENCE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [str(python), str(Path(__file__).with_name("_trl_ppo.py"))]
    output = _checked(command, folder / "trl.log", input=json.dumps(job), env=environment)
    return json.loads(output.splitlines()[-1])


def _vcppo(arguments: list[str], log: Path) -> None:
    _checked([sys.executable, "-m", "megatron_vcppo.cli", *arguments], log)


def _checked(command: list[str], log: Path, **options: Any) -> str:
    """Run a command, its messages in ``log``; returns its output. A failure ends the benchmark with its last lines."""
    with log.open("w") as messages:
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=messages, text=True, timeout=TIMEOUT_S, **options
        )
    if done.returncode:
        tail = "\n".join((done.stdout + log.read_text()).splitlines()[-20:])
        raise SystemExit(f"{' '.join(command[:4])} … ended with {done.returncode}:\n{tail}")
    return done.stdout
