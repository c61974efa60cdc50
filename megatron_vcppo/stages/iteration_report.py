"""Reports of a PPO iteration besides its metrics: the progress line, profiles, warnings that name a failure."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import isfinite

from megatron_vcppo.algo.failure_signatures import warned_before, warnings_of
from megatron_vcppo.report.run_data import worst_reward
from megatron_vcppo.run.files import append_json_line
from megatron_vcppo.run.metrics_log import cut_back, read_history
from megatron_vcppo.stages.loop import TrainLoop
from megatron_vcppo.stages.stage import Stage


class IterationReport:
    """The profiles of each iteration, in RUN/ppo/profiles.jsonl, and warnings that name a failure; main rank."""

    def __init__(self, stage: Stage, loop: TrainLoop) -> None:
        self.loop, self.is_main = loop, stage.runtime.is_main
        self.path, self.worst_reward = stage.folder.profiles, worst_reward(asdict(stage.config))
        self.history: list[dict[str, float]] = []
        self.warned: set[str] = set()
        """Signatures that were printed, also before a resume: each is printed once."""
        if self.is_main:
            self.history = read_history(stage.folder.path)
            self.warned = warned_before(self.history, self.worst_reward)
            cut_back(self.path, loop.step)

    def add(self, iteration: int, metrics: dict[str, float], profiles: Mapping[str, Sequence[float | None]]) -> None:
        """An iteration that was logged."""
        if not self.is_main:
            return
        finite = {name: [x if x is not None and isfinite(x) else None for x in row] for name, row in profiles.items()}
        append_json_line(self.path, {"iteration": iteration, **finite})
        self.history.append({"iteration": iteration, **metrics})
        for text in warnings_of(self.history, self.worst_reward, self.warned):
            self.loop.warn(text)


def shown(metrics: dict[str, float]) -> dict[str, float]:
    """What the progress line shows of an iteration: how it went, and the seconds of each phase."""
    names = {
        "reward": "rollout/reward_mean",
        "pass@1": "rollout/accuracy",
        "length": "rollout/length_mean",
        "ev": "critic/explained_variance",
        "kl": "actor/approx_kl",
        "gap": "rollout/logprob_gap",
        "held_out": "evaluation/avg",
    }
    found = {short: metrics[name] for short, name in names.items() if name in metrics}
    phases = {name.removeprefix("time/"): value for name, value in metrics.items() if name.startswith("time/")}
    return found | {name: phases[name] for name in (*sorted(phases.keys() - {"iteration_s"}), "iteration_s")}
