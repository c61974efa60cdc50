"""Tools: which are known, what the calculator says, and what a bad one costs."""

from pathlib import Path

import pytest

from megatron_vcppo.errors import UserError
from megatron_vcppo.records import Prompt
from megatron_vcppo.rewards.scorer import Scorer
from megatron_vcppo.rewards.tools import check_tools, resolve_tools

OWN = """
import os, time

class Tool:
    stop = "</call>"
    def __init__(self, act):
        self.act = act
    def __call__(self, prompt, text):
        return self.act(prompt, text)

echoes = Tool(lambda prompt, text: f"{prompt.prompt_id}: {text}")
hangs = Tool(lambda prompt, text: time.sleep(3600))
raises = Tool(lambda prompt, text: 1 / 0)
dies = Tool(lambda prompt, text: os._exit(7))
numbers = Tool(lambda prompt, text: 7)
floods = Tool(lambda prompt, text: "x" * 10_000_000)

def no_stop(prompt, text):
    return ""
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    (tmp_path / "own_tools.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    return {name: f"own_tools:{name}" for name in ("echoes", "hangs", "raises", "dies", "numbers", "floods")}


def prompt(task: str) -> Prompt:
    return Prompt(f"p:{task}", (1, 2), "", "7", task)


@pytest.mark.parametrize(
    ("text", "digit"),
    [
        ("<think> #1 chk 3 +4 ?", "7"),
        ("<think> #1 +4 7 #2 chk 7 -9 ?", "8"),
        ("<think> 3 +4 ?", ""),
        ("chk 3 reverse ?", ""),
        ("chk +4 3 ?", ""),
        ("?", ""),
    ],
)
def test_the_calculator_answers_calls_and_nothing_else(text: str, digit: str) -> None:
    tool = resolve_tools({})["tool_sum"]
    assert tool.stop == "?" and tool(prompt("tool_sum"), text) == digit


def test_a_bad_tool_writes_nothing_and_is_reported(own: dict[str, str]) -> None:
    with Scorer(num_workers=2, timeout_s=0.5, tools=own) as scorer:
        assert scorer.tool_stops == {**dict.fromkeys(own, "</call>"), "tool_sum": "?"}
        calls = {name: scorer.call_tool(prompt(name), "ab") for name in (*own, "tool_sum")}
        assert {name: call.result() for name, call in calls.items() if name != "floods"} == {
            "echoes": "p:echoes: ab",
            **dict.fromkeys(("hangs", "raises", "dies", "numbers", "tool_sum"), ""),
        }
        assert calls["floods"].result() == "x" * (1 << 16)
        assert sorted(scorer.take_problems()) == [
            "p:dies (task dies): tool: error: the verifier process died (exit code 7)",
            "p:hangs (task hangs): tool: timeout: 0.5 s",
            "p:numbers (task numbers): tool: error: TypeError: the tool gave int, not text",
            "p:raises (task raises): tool: error: ZeroDivisionError: division by zero",
        ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("abacus", "prompts.tools.t: no tool 'abacus'; use one of digit_calculator, or module:name"),
        ("own_tools:nothing", "prompts.tools.t: cannot import own_tools:nothing"),
        ("own_tools:no_stop", "prompts.tools.t: own_tools:no_stop must be callable and have a text named stop"),
    ],
)
def test_what_is_no_tool_is_refused(own: dict[str, str], name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve_tools({"t": name})
    if name == "abacus":
        with pytest.raises(UserError, match=message):
            check_tools({"t": name})
