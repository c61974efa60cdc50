"""avg@n, pass@k and maj@k of what the chain's stages left, or of any Hugging Face checkpoints, in one table."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vcppo.config import Config
from megatron_vcppo.errors import Stopped, UserError
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.mcore import runtime
from megatron_vcppo.mcore.hf_weights_io import stream_hf
from megatron_vcppo.mcore.model import ActorModel, build_actor
from megatron_vcppo.mcore.starting_weights import load_component, load_from_hf
from megatron_vcppo.records import RolloutPart
from megatron_vcppo.report.text_table import markdown_table, percent_interval, text_table
from megatron_vcppo.run.events import startup
from megatron_vcppo.run.files import write_json, write_text
from megatron_vcppo.run.folder import RunFolder
from megatron_vcppo.run.log import say
from megatron_vcppo.run.rollout_store import claim
from megatron_vcppo.stages.held_out import evaluation_prompts, evaluation_rollouts, gather_outcomes, scores
from megatron_vcppo.stages.provenance import origin_of_evaluation
from megatron_vcppo.stages.rollout_session import BatchNumber, RolloutSession
from megatron_vcppo.stages.stage import ACTOR_STAGES, Stage, start_stage
from megatron_vcppo.stages.stopping import Saved, stopping


def run(config: Config) -> None:
    """Evaluate; writes RUN/evaluate/results.json, results.md and the responses, and prints a table.

    Raises Saved if asked to stop: responses that are stored are not generated again.
    """
    stage = start_stage(config, "evaluate")
    if config.prompts.test is None:
        raise UserError("stage evaluate: prompts.test is not set; give it held-out problems")
    found = candidates(config)
    results: list[dict[str, Any]] = []
    with RolloutSession(stage) as session:
        session.start_engines()
        model = build_actor(Architecture.from_hf(config.model.hf), config.model, config.parallel)
        session.share(model)
        startup.done("model")
        prompts = evaluation_prompts(config, session)
        if stage.runtime.is_main:
            claim(
                session.batches.folder, origin_of_evaluation(config, {name: c.folder for name, c in found.items()}), -1
            )
        for version, (name, candidate) in enumerate(found.items()):
            rollouts = session.batches.stored(version, prompts, config.evaluate.num_samples)
            if rollouts is None:
                try:
                    rollouts = generate(config, session, model, candidate, version)
                except Stopped:
                    raise Saved(f"asked to stop: {version} of {len(found)} checkpoints are evaluated") from None
            session.batches.finish()
            outcomes = gather_outcomes(rollouts, session, config.evaluate.k)
            results.append({"name": name, **scores(outcomes, config.evaluate.k, session.verifiers)})
            if stage.runtime.is_main:
                startup.finish(stage.folder.path)
                say(f"{name}:\n{table(results[-1:])}")
    if stage.runtime.is_main:
        write_results(stage, results)
    runtime.stop()


def generate(
    config: Config, session: RolloutSession, model: ActorModel, candidate: "Candidate", version: int
) -> RolloutPart:
    """A candidate's scored responses, which leaders store. Raises Stopped on every rank if any was asked to stop."""
    stopping.point()
    session.wait_for_engines()
    candidate.load(model, Path(config.model.hf))
    startup.done("model")
    session.push(version, lambda: stream_hf(model))
    rollouts = evaluation_rollouts(config, session, BatchNumber.candidate(version))
    session.trainer_turn()
    session.batches.store(version, rollouts)
    return rollouts


def write_results(stage: Stage, results: list[dict[str, Any]]) -> None:
    """The files, the table, the manifest; main rank."""
    folder = stage.folder
    write_json(folder.results, results)
    write_text(folder.results_table, markdown(results, stage.config))
    say(f"results:\n{table(results)}")
    folder.mark_done(outputs=(folder.results.name, folder.results_table.name))


@dataclass(frozen=True)
class Candidate:
    """Weights to be evaluated."""

    folder: Path
    is_base: bool
    """Not a checkpoint of a run: a Hugging Face folder, or model.weights."""

    def load(self, model: ActorModel, hf: Path) -> None:
        """Put them into a model. hf: model.hf."""
        if self.is_base:
            load_from_hf(model, self.folder)
        else:
            load_component(model, self.folder, hf)


def candidates(config: Config) -> dict[str, Candidate]:
    """By name: evaluate.checkpoints, or the actors of the chain's finished stages, or else model.hf.

    Of a stage that kept its best actor (``checkpoint.keep_best``), also that one, unless it is the last.
    """
    chosen = config.evaluate.checkpoints
    for name, path in chosen.items():
        if Architecture.from_hf(path) != Architecture.from_hf(config.model.hf):
            raise UserError(f"evaluate.checkpoints.{name}: {path} is another architecture than model.hf")
    if chosen:
        return {name: Candidate(Path(path), True) for name, path in chosen.items()}
    found: dict[str, Candidate] = {}
    for stage in config.stages:
        folder = RunFolder.of(config).stage(stage)
        checkpoint = folder.last_checkpoint("actor") if stage in ACTOR_STAGES else None
        if checkpoint is not None:
            found[stage] = Candidate(checkpoint, False)
            best = folder.best.resolve() if folder.best.is_dir() else checkpoint.parent
            if best.name != checkpoint.parent.name:
                found[f"{stage} {best.name}, best"] = Candidate(best / "actor", False)
    return found or {Path(config.model.base).name: Candidate(Path(config.model.base), True)}


def table(results: list[dict[str, Any]]) -> str:
    """The results as aligned text, in percent with 95 % intervals; the tasks of a mixture below each checkpoint."""
    return text_table(_rows(results))


def markdown(results: list[dict[str, Any]], config: Config) -> str:
    """The same as Markdown, with the settings that made them."""
    evaluate = config.evaluate
    settings = (
        f"Samples per problem: {evaluate.num_samples}; temperature {evaluate.temperature:g}, top-p {evaluate.top_p:g}, "
        f"at most {config.rollout.max_tokens} tokens, run.seed {config.run.seed}. In brackets: 95 % intervals over "
        "problems."
    )
    return f"# {config.prompts.test}\n\n{markdown_table(_rows(results))}\n\n{settings}\n"


def _rows(results: list[dict[str, Any]]) -> list[dict[str, str]]:
    parts = [
        (name, part)
        for row in results
        for name, part in [(row["name"], row), *((f"  {task}", part) for task, part in row["tasks"].items())]
    ]
    return [
        {
            "checkpoint": name,
            "avg": percent_interval(part["avg"], part["avg_interval"], *part["avg_range"]),
            **{f"{kind}@{k}": percent_interval(*value) for kind in ("pass", "maj") for k, value in part[kind].items()},
            "length": f"{part['length_mean']:.1f}",
            "truncated": f"{100 * part['truncated_share']:.1f} %",
        }
        for name, part in parts
    ]
