"""The scorer: verifiers that raise, hang, die or chatter cost their answer, and nothing else."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_vcppo.errors import UserError
from megatron_vcppo.records import Prompt, Rollout
from megatron_vcppo.rewards.scorer import Scorer
from megatron_vcppo.run.processes import alive

VERIFIERS = """
import os, time
from megatron_vcppo.rewards.verifier import CORRECT, Verdict

def hangs(prompt, response):
    if response == "good":
        return CORRECT
    with open(__file__ + ".pid", "w") as file:
        file.write(str(os.getpid()))
    time.sleep(3600)

def hogs(prompt, response):
    return Verdict(float(len(bytearray(3 << 30)) > 0), "it got 3 GiB")

def aborts(prompt, response):
    # What a library in C does where it gets no memory.
    try:
        bytearray(3 << 30)
    except MemoryError:
        os.abort()

def towers(prompt, response):
    return Verdict(1.0, str((1 << (1 << (1 << 5))).bit_length()))

def spins(prompt, response):
    while True:
        pass

def raises(prompt, response):
    return 1 / 0

def dies(prompt, response):
    os._exit(7)

def write(data):
    # What code that has got hold of the worker's socket could send.
    for number in range(3, 30):
        try:
            if os.readlink(f"/proc/self/fd/{number}").startswith("socket:"):
                os.write(number, data)
        except OSError:
            pass
    return CORRECT

def frame(text):
    return len(text).to_bytes(4, "big") + text.encode()

def forges(prompt, response):
    return write(frame('{"id": "0", "reward": 1000000.0, "verdict": "correct"}'))

def forges_nan(prompt, response):
    return write(frame('{"id": "0", "reward": NaN, "verdict": "correct"}'))

def forges_nonsense(prompt, response):
    return write(frame("{"))

def forges_kind(prompt, response):
    return write(frame("[" * 100000))

def forges_length(prompt, response):
    return write((2**31).to_bytes(4, "big"))

def forges_half(prompt, response):
    write(b"\\0\\0\\0\\x05[")
    time.sleep(3600)

def shows(prompt, response):
    return Verdict(1.0, "wrong: \\x1b[2J" + "x" * 1000)

def nonsense(prompt, response):
    return Verdict(float("nan"), "nan")

def chatters(prompt, response):
    print("noise on standard output")
    return Verdict(0.25, os.environ.get("WANDB_API_KEY", "no key"))
"""
NAMES = ("hangs", "spins", "raises", "dies", "nonsense", "chatters", "shows", "hogs", "aborts", "towers")
FORGERIES = {
    "forges": "error: the verifier process sent a reply to another request",
    "forges_nan": "error: the verifier process sent a reply that is no verdict",
    "forges_nonsense": "error: the verifier process sent no JSON: JSONDecodeError",
    "forges_kind": "error: the verifier process sent no JSON: RecursionError",
    "forges_length": "error: the verifier process sent a message of 2147483648 bytes; the most is 1048576",
    "forges_half": "timeout: 2 s",
}


@pytest.fixture
def own_verifiers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    (tmp_path / "own_verifiers.py").write_text(VERIFIERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    return {name: f"own_verifiers:{name}" for name in (*NAMES, *FORGERIES)}


def rollout(task: str, response: str, answer: str = "7", finish_reason: str = "stop") -> Rollout:
    prompt = Prompt(f"p:{task}", (1, 2), "3 #1 +4 ?", answer, task)
    return Rollout(prompt, 0, 0, (3,), response, (-0.5,), finish_reason, 0)


def test_rollouts_are_scored_in_order_by_their_task() -> None:
    rollouts = [
        rollout("running_sum", "<think> #1 +4 7 </think> = 7"),
        rollout("running_sum", "<think> #1 +4 8 </think> = 8"),
        rollout("math", r"\boxed{14/2}"),
        rollout("multiple_choice", r"\boxed{C}", answer="C"),
        rollout("running_sum", "<think> #1 +4 7 </think> = 7", finish_reason="length"),
        rollout("math", "?"),
    ] * 20
    with Scorer(num_workers=2, timeout_s=10.0) as scorer:
        scored = scorer.score(iter(rollouts))
        assert [s.reward for s in scored] == [1.0, -1.0, 1.0, 1.0, -1.0, -1.0] * 20
        assert [s.verdict for s in scored[:6]] == ["correct", "wrong", "correct", "correct", "truncated", "no answer"]
        assert [(s.prompt, s.response_ids) for s in scored] == [(r.prompt, r.response_ids) for r in rollouts]
        assert scorer.take_problems() == []


def test_bad_verifiers_cost_their_answer_only(own_verifiers: dict[str, str], tmp_path: Path) -> None:
    names = ["raises", "hangs", "dies", "chatters", "spins", "nonsense"]
    with Scorer(num_workers=2, timeout_s=0.5, verifiers=own_verifiers) as scorer:
        scored = scorer.score(rollout(name, "x") for name in names for _ in range(2))
        after = scorer.score([rollout("hangs", "good"), rollout("math", r"\boxed{7}")])
        assert [s.verdict for s in after] == ["correct", "correct"]
        verdicts = {s.prompt.task: s.verdict for s in scored}
        assert verdicts == {
            "raises": "error: ZeroDivisionError: division by zero",
            "hangs": "timeout: 0.5 s",
            "dies": "error: the verifier process died (exit code 7)",
            "chatters": "no key",
            "spins": "timeout: 0.5 s",
            "nonsense": "error: ValueError: the verifier gave the reward nan",
        }
        assert {s.prompt.task: s.reward for s in scored} == dict.fromkeys(names, -1.0) | {"chatters": 0.25}
        problems = scorer.take_problems()
        assert len(problems) == 10 and "p:hangs (task hangs): timeout: 0.5 s" in problems
    assert not alive(int((tmp_path / "own_verifiers.py.pid").read_text()))


def test_an_answer_that_takes_the_nodes_memory_costs_its_worker_at_most(own_verifiers: dict[str, str]) -> None:
    with Scorer(1, 10.0, own_verifiers, memory_mib=256) as scorer:
        bad = [rollout("hogs", "x"), rollout("aborts", "x"), rollout("towers", "x")]
        scored = scorer.score(r for one in bad for r in (one, rollout("math", r"\boxed{7}")))
        program = "```python\nprint(len(bytearray(1 << 30)))\n```"
        large = rollout("code", program, json.dumps({"inputs": [""], "outputs": [str(1 << 30)]}))
        assert scorer.score([large])[0].verdict == "correct", "a program has its own limit"
    assert [s.verdict for s in scored[::2]] == [
        "error: MemoryError: ",
        "error: the verifier process died (exit code -6)",
        "error: MemoryError: ",
    ]
    assert [s.verdict for s in scored[1::2]] == ["correct"] * 3


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_message_costs_its_worker_and_its_answer(own_verifiers: dict[str, str], name: str) -> None:
    """Without ids, every later verdict of that worker would be the one of the answer before."""
    with Scorer(num_workers=1, timeout_s=2.0, verifiers=own_verifiers) as scorer:
        answers = [(name, "x"), ("math", r"\boxed{7}"), ("math", r"\boxed{8}"), ("math", r"\boxed{7}"), ("shows", "x")]
        scored = scorer.score(rollout(*answer) for answer in answers)
    assert [s.verdict for s in scored[:4]] == [FORGERIES[name], "correct", "wrong: 8", "correct"]
    assert [s.reward for s in scored[:4]] == [-1.0, 1.0, -1.0, 1.0]
    assert scored[4].verdict == "wrong: \ufffd[2J" + "x" * 489, "no control characters, no endless text"


def test_programs_are_judged_in_workers(own_verifiers: dict[str, str]) -> None:
    """A worker keeps its sandbox from answer to answer, and takes it along when it is killed."""
    answer = '{"inputs": ["1 2"], "outputs": ["3"]}'
    right, endless = "```python\nprint(3)\n```", "```python\nwhile True: pass\n```"
    with Scorer(num_workers=1, timeout_s=5.0, verifiers=own_verifiers) as scorer:
        texts = [right, endless, right, "```python\nprint(4)\n```"]
        scored = scorer.score([rollout("code", text, answer) for text in texts] + [rollout("dies", "x")])
        again = scorer.score([rollout("code", right, answer)])
    verdicts = ["correct", "wrong: test 1: time limit", "correct", "wrong: test 1: wrong output"]
    assert [s.verdict for s in scored[:4]] == verdicts and again[0].verdict == "correct"


def test_unknown_verifiers_are_refused_at_once() -> None:
    with pytest.raises(UserError, match=r"verifiers.gpqa: no verifier 'choice'; use one of code, list_ops, math"):
        Scorer(1, 1.0, {"gpqa": "choice"})
    with pytest.raises(UserError, match=r"cannot import nowhere:f"):
        Scorer(1, 1.0, {"gpqa": "nowhere:f"})
    with Scorer(1, 1.0, {"gpqa": "multiple_choice"}) as scorer:
        assert scorer.score([rollout("gpqa", r"\boxed{B}", "B")])[0].reward == 1.0
        with pytest.raises(AssertionError, match="no verifier for task 'poetry'"):
            scorer.submit(rollout("poetry", "x"))


def test_a_stage_that_fails_does_not_wait_for_verdicts(own_verifiers: dict[str, str]) -> None:
    with pytest.raises(KeyError), Scorer(1, 1.0, own_verifiers) as scorer:
        futures = [scorer.submit(rollout("hangs", "x")) for _ in range(30)]
        raise KeyError
    assert futures[-1].cancelled()


def test_a_worker_ends_with_its_scorer(own_verifiers: dict[str, str], tmp_path: Path) -> None:
    """If the scorer's process is gone, a verifier that still hangs is ended by its own alarm."""
    pid_file = tmp_path / "own_verifiers.py.pid"
    scorer_process = os.fork()
    if scorer_process == 0:
        Scorer(1, 3.0, own_verifiers).submit(rollout("hangs", "x"))
        wait_until(pid_file.exists)
        os._exit(0)
    os.waitpid(scorer_process, 0)
    pid = int(wait_until(pid_file.read_text))
    assert alive(pid)
    wait_until(lambda: not alive(pid))


def wait_until(condition: Callable[[], Any]) -> Any:
    """The condition's first true value; fails after 30 s."""
    deadline = time.monotonic() + 30
    while not (value := condition()):
        assert time.monotonic() < deadline, "still waiting after 30 s"
        time.sleep(0.05)
    return value
