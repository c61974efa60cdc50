"""``vcppo data inspect``: what it counts, and what it calls wrong."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_vcppo.cli import main as vcppo
from megatron_vcppo.data.contamination import compare
from megatron_vcppo.data.inspection import length_text, show
from megatron_vcppo.data.sft_dataset import load_sft_dataset
from megatron_vcppo.run.files import write_text
from megatron_vcppo.tasks.base_model import write_base_model
from megatron_vcppo.tasks.word_tokenizer import build_tokenizer


def problem(prompt: str) -> dict:
    return {"prompt": prompt, "answer": "7", "task": "math", "response": "<think> 7 </think> = 7"}


class Inspect:
    """A configuration with three files, and the command on it."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys
        write_base_model(folder / "model")
        self.write("sft", *(f"{i} #1 +1 ?" for i in range(5)))
        self.write("train", *(f"{i} #1 +2 ?" for i in range(5)))
        self.write("test", *(f"{i} #1 +3 ?" for i in range(5)))
        sections = {
            "run": {"dir": str(folder / "run")},
            "model": {"hf": str(folder / "model"), "max_length": 64},
            "stages": ["sft", "ppo"],
            "rollout": {"max_tokens": 16},
            "sft": {"train": self.path("sft")},
            "prompts": {"train": self.path("train"), "test": self.path("test")},
            "ppo": {"critic": {"init": "sft"}},
        }
        write_text(folder / "c.yaml", json.dumps(sections))

    def path(self, name: str) -> str:
        return str(self.folder / f"{name}.jsonl")

    def write(self, name: str, *prompts: str, **extra: object) -> None:
        write_text(Path(self.path(name)), "".join(json.dumps(problem(p) | extra) + "\n" for p in prompts))

    def __call__(self, *arguments: str) -> tuple[int, str, list[str]]:
        """Exit code, output, and the lines that say what is wrong."""
        code = vcppo(["data", "inspect", str(self.folder / "c.yaml"), *arguments])
        out = self.capsys.readouterr().out
        return code, out, [line for line in out.splitlines() if line.startswith("wrong: ")]


@pytest.fixture
def inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Inspect:
    return Inspect(tmp_path, capsys)


def test_sound_data(inspect: Inspect) -> None:
    code, out, wrong = inspect("--samples", "1")
    assert code == 0 and not wrong and out.endswith("nothing is wrong\n")
    assert f"sft.train: {inspect.path('sft')}: 5 samples, 5 used" in out
    assert "sample: <bos> 0 #1 +1 ?⟦<think> 7 </think> = 7 <eos>⟧" in out
    assert "sample: <bos> 0 #1 +2 ? | answer 7 | task math" in out
    assert "tokens: min 5, 10 % ≤ 5, median 5, 90 % ≤ 5, 99 % ≤ 5, max 5, sum 25" in out
    assert "prompts that came before: 0 of 5 (0.0%)" in out and out.count("sample: ") == 3
    assert not (inspect.folder / "run").exists()


def test_a_clusters_profile_is_read(inspect: Inspect) -> None:
    profile = inspect.folder / "site.yaml"
    write_text(profile, "{cluster: {name: site}, model: {max_length: 8}, rollout: {max_tokens: 4}}")
    assert "5 of 5 (100.0%) are above 8 tokens (model.max_length)" in inspect("--cluster", str(profile))[1]
    assert inspect("--cluster", "none")[0] == 2


@pytest.mark.parametrize("where", ["sft", "train"])
def test_held_out_prompts_in_training_data_are_wrong(inspect: Inspect, where: str) -> None:
    inspect.write("test", "9 ?", "3   #1 +1 ?" if where == "sft" else "3   #1 +2 ?")
    code, _, wrong = inspect()
    key = {"sft": "sft.train", "train": "prompts.train"}[where]
    assert code == 1 and len(wrong) == 1
    assert wrong[0].startswith(f"wrong: prompts.test: 1 of 2 (50.0%) prompts are in {key}, too, such as '3 #1 +")


def test_validation_prompts_are_compared_with_those_of_sft_only(inspect: Inspect) -> None:
    inspect.write("validation", "1 #1 +2 ?")
    assert inspect(f"sft.validation={inspect.path('validation')}")[0] == 0
    inspect.write("validation", "1 #1 +1 ?")
    code, _, wrong = inspect(f"sft.validation={inspect.path('validation')}")
    assert code == 1 and "sft.validation: 1 of 1 (100.0%) prompts are in sft.train" in wrong[0]


def test_copies(inspect: Inspect) -> None:
    inspect.write("train", "1 ?", "1  ?", "2 ?", "3 ?")
    assert inspect()[0] == 0
    inspect.write("train", *["1 ?"] * 3, "2 ?", "2 ?")
    code, out, wrong = inspect()
    assert "prompts that came before: 3 of 5 (60.0%)" in out
    assert code == 1 and wrong == ["wrong: prompts.train: 3 of 5 (60.0%) are copies of earlier prompts; remove them"]


def test_bad_and_long_samples_are_wrong_where_they_stop_a_run(inspect: Inspect) -> None:
    inspect.write("train", *(f"{i} ?" for i in range(10)), *(f"{'1 ' * 60}{i} {i} {i} ?" for i in range(1)))
    with open(inspect.path("train"), "a", encoding="utf-8") as file:
        file.write(json.dumps(problem("4 #1 -4 ?") | {"answer": None}) + "\n")
    code, out, wrong = inspect()
    assert f"1 × null: {inspect.path('train')}:12" in out
    assert "above 63 tokens (model.max_length less one token of a response): 1 of 11" in out
    assert code == 1 and wrong == [
        "wrong: prompts.train: 1 of 12 (8.3%) are bad samples, at which a run stops (bad_samples: error)",
        "wrong: prompts.train: 1 of 11 (9.1%) are above 63 tokens (model.max_length less one token of a response)",
    ]
    inspect.write("train", *(f"{i} {j} ?" for i in range(6) for j in range(6)), "1 " * 70)
    assert inspect()[0] == 1 and inspect("prompts.bad_samples=skip")[0] == 0


def test_long_pieces_of_training_prompts_in_held_out_ones_are_wrong(inspect: Inspect) -> None:
    steps = [" ".join(f"#{i} +{(7 * i * k) % 10}" for i in range(1, 11)) for k in range(1, 5)]
    inspect.write("train", *(f"{k} {text} ?" for k, text in enumerate(steps)))
    inspect.write("test", f"9 {steps[0]} ?", "5 #1 +1 #2 +1 #3 +1 #4 +1 #5 +1 #6 +1 #7 +1 #8 +1 ?")
    code, out, wrong = inspect()
    assert "prompts.test in prompts.train: of the 13-grams of a prompt 44.4% on average, 88.9% at most" in out
    assert code == 1 and len(wrong) == 1
    assert "1 of 2 (50.0%) prompts have half or more of their 13-grams in prompts.train, such as '9 #1" in wrong[0]


def test_what_all_prompts_have_in_common_is_no_overlap() -> None:
    template = "please solve the following problem step by step and put the answer at the very end of the text: "
    own = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi"
    known = [*(f"{template}Runner{i} covers {i} miles." for i in range(20)), f"{template}Ann has $12$ boats, {own}."]
    new = [f"{template}Tom{i} swims {i} laps and rests" for i in range(4)]
    found = compare("train", known, "test", [*new, f"{template}RUNNER3 covers 3  miles", f"{template}Eve has 7. {own}"])
    assert found.equal == (f"{template}RUNNER3 covers 3  miles",)
    assert [share for share, _ in found.shares[:4]] == [0.0] * 4 and found.shares[4][0] > 0.1
    # Few held-out prompts do not show what their template is; many training prompts do.
    assert compare("train", known, "test", new[:1]).shares == ((0.0, new[0]),)


@pytest.mark.parametrize(("one", "other", "same"), [
    ("Find  $\\frac{1}{2}+X$.", "find \\frac12 + x", True),
    ("What is 'a', b?", "what is a b", True),
    ("3 #1 +4 ?", "3 #1 -4 ?", False),
    ("Find 1.5", "find 15", False),
    ("1 2 ?", "12 ?", False),
    ("Find 5!", "find 5", False),
])  # fmt: skip
def test_only_layout_is_ignored(one: str, other: str, same: bool) -> None:
    assert bool(compare("a", [one], "b", [other]).equal) is same


def test_torch_is_not_imported(inspect: Inspect) -> None:
    program = (
        "import sys; from megatron_vcppo.cli import main\n"
        f"assert main(['data', 'inspect', {str(inspect.folder / 'c.yaml')!r}]) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0 and "PyTorch" not in found.stderr, found.stderr


def test_every_source_of_a_mix_is_read(inspect: Inspect) -> None:
    inspect.write("more", "3 #1 +3 ?")
    code, out, wrong = inspect(f"prompts.mix={{{inspect.path('more')}: 2}}")
    assert code == 1 and f"prompts.mix {inspect.path('more')}" in wrong[0] and "1 samples, 1 used" in out


def test_a_users_mistake_costs_one_line(inspect: Inspect, capsys: pytest.CaptureFixture[str]) -> None:
    assert vcppo(["data", "inspect", str(inspect.folder / "c.yaml"), "prompts.train=/none.jsonl"]) == 2
    assert capsys.readouterr().err == "vcppo: error: /none.jsonl: no such file or folder\n"


def test_lengths_as_text() -> None:
    assert length_text(np.array([], dtype=int)) == "none"
    text = "min 1, 10 % ≤ 101, median 501, 90 % ≤ 901, 99 % ≤ 991, max 1,001, sum 501,501"
    assert length_text(np.arange(1, 1002)) == text


def test_a_long_sample_is_shown_from_both_ends(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text(json.dumps({"prompt": "3 ?", "response": "1 " * 2000 + "= 7"}))
    tokenizer = build_tokenizer()
    text = show(tokenizer, load_sft_dataset(str(path), tokenizer, 5000)[0][0])
    assert text.startswith("<bos> 3 ?⟦1 1") and text.endswith("1 = 7 <eos>⟧") and " […] " in text and len(text) < 1300
