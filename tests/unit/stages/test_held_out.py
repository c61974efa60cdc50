"""What an evaluation reports: over all and by task, as metrics and as tables."""

from pathlib import Path

import pytest

from megatron_vcppo.config import Config
from megatron_vcppo.records import Prompt, Rollout
from megatron_vcppo.rewards.registry import VERIFIERS
from megatron_vcppo.run.folder import StageFolder
from megatron_vcppo.run.manifest import write_manifest
from megatron_vcppo.stages.evaluate import candidates, markdown, table
from megatron_vcppo.stages.held_out import Outcome, evaluation_metrics, outcomes_of, scores


def rollouts(task: str, right: list[list[bool]], length: int) -> list[Outcome]:
    made = [
        Rollout(Prompt(f"{task}:{i}", (1,), "", "", task), j, 0, (2,) * length, "", (), "stop", 0, 1.0 if ok else -1.0)
        for i, row in enumerate(right)
        for j, ok in enumerate(row)
    ]
    return outcomes_of(made, VERIFIERS, [2])


SUM = rollouts("sum", [[True, False], [True, True]], 4)
LIST = rollouts("list", [[False, False], [False, True]], 8)


def test_one_task() -> None:
    found = scores(SUM, [1, 2], VERIFIERS)
    assert found["avg"] == 0.75 and found["pass"]["2"][0] == 1.0 and found["length_mean"] == 4 and not found["tasks"]
    metrics = evaluation_metrics(SUM, [1, 2], VERIFIERS)
    assert set(metrics) == {
        "evaluation/avg",
        "evaluation/avg_interval",
        "evaluation/length_mean",
        "evaluation/truncated_share",
        "evaluation/pass@1",
        "evaluation/pass@1_interval",
        "evaluation/pass@2",
        "evaluation/pass@2_interval",
    }


def test_a_mixture_is_reported_by_task_too() -> None:
    metrics = evaluation_metrics(SUM + LIST, [2], VERIFIERS)
    assert metrics["evaluation/avg"] == 0.5 and metrics["evaluation/pass@2"] == 0.75
    assert metrics["evaluation/sum/avg"] == 0.75 and metrics["evaluation/list/pass@2"] == 0.5
    assert metrics["evaluation/list/avg"] == pytest.approx(0.25)
    lines = table([{"name": "ppo", **scores(SUM + LIST, [2], VERIFIERS)}]).splitlines()
    assert [line.split()[0] for line in lines] == ["checkpoint", "ppo", "sum", "list"]
    assert "75.0" in lines[2] and "25.0" in lines[3]


def answered(task: str, answers: list[str], right: list[bool], truncated: list[bool]) -> list[Outcome]:
    return outcomes_of(responses(task, answers, right, truncated), VERIFIERS, [2])


def responses(task: str, answers: list[str], right: list[bool], truncated: list[bool]) -> list[Rollout]:
    prompt = Prompt("p:1", (1,), "", "", task)
    return [
        Rollout(prompt, i, 0, (2,), text, (), "length" if cut else "stop", 0, 1.0 if ok else -1.0)
        for i, (text, ok, cut) in enumerate(zip(answers, right, truncated))
    ]


def test_the_majority_counts_what_the_verifier_reads() -> None:
    answers = [r"\boxed{\frac12}", "The answer is 0.5.", r"\boxed{3}", r"\boxed{3.0}", "I give up", r"\boxed{3}"]
    given = answered("math", answers, [True, True, False, False, False, False], [False] * 5 + [True])
    assert scores(given, [1, 6], VERIFIERS)["maj"] == {"6": [0.5, *scores(given, [6], VERIFIERS)["maj"]["6"][1:]]}
    assert evaluation_metrics(given, [6], VERIFIERS)["evaluation/maj@6"] == 0.5
    assert scores(given[:3], [3], VERIFIERS)["maj"]["3"][0] == 1.0


def test_programs_have_no_majority() -> None:
    given = answered("code", ["", ""], [True, False], [False, False])
    assert scores(given, [2], VERIFIERS)["maj"] == {}
    own_verifiers = {"code": lambda prompt, response: VERIFIERS["math"](prompt, response)}
    own = scores(given, [2], own_verifiers)
    assert own["maj"] == {}


def test_results_as_markdown() -> None:
    config = Config()
    config.prompts.test, config.evaluate.num_samples = "aime.jsonl", 2
    lines = markdown([{"name": "p|po", **scores(SUM, [2], VERIFIERS)}], config).splitlines()
    assert lines[0] == "# aime.jsonl"
    assert lines[2] == "| checkpoint | avg | pass@2 | length | truncated |" and lines[3] == "| --- |" + " --- |" * 4
    assert lines[4].startswith(r"| p\|po | 75.0 % (") and "100.0 % (" in lines[4]
    assert lines[6].startswith("Samples per problem: 2; ")


def test_the_best_checkpoint_is_evaluated_beside_the_last(tmp_path: Path) -> None:
    config = Config()
    config.run.dir, config.model.hf, config.stages = str(tmp_path), "base", ["sft", "ppo", "evaluate"]
    for name, last in (("sft", 4), ("ppo", 9)):
        stage = StageFolder(tmp_path / name)
        for iteration in (last, 3):
            (stage.checkpoint(iteration) / "actor").mkdir(parents=True)
        write_manifest(stage.checkpoint(last), {})
        stage.mark_done(checkpoint=stage.checkpoint(last))
    assert list(candidates(config)) == ["sft", "ppo"]
    ppo = StageFolder(tmp_path / "ppo")
    for best, names in ((3, ["sft", "ppo", "ppo iter_0000003, best"]), (9, ["sft", "ppo"])):
        (ppo.kept_checkpoint(best) / "actor").mkdir(parents=True)
        ppo.best.unlink(missing_ok=True)
        ppo.best.symlink_to(ppo.kept_checkpoint(best).name)
        found = candidates(config)
        assert list(found) == names
        assert found[names[-1]].folder.parent.name == ("iter_0000003" if best == 3 else "iter_0000009")
