"""The turns of a response: one budget, one seed per turn, and what a tool wrote is marked."""

from concurrent.futures import Future
from pathlib import Path

from megatron_vcppo.config import RolloutConfig
from megatron_vcppo.records import Prompt, Rollout
from megatron_vcppo.rollout.client import RolloutClient
from megatron_vcppo.rollout.messages import GenerateRequest, Response
from megatron_vcppo.rollout.turns import ToolCalls, Turns

FIRST = GenerateRequest(3, [1, 2], max_tokens=8, seed=5)


def answer(ids: list[int], reason: str = "stop", version: int = 4) -> Response:
    return Response(3, ids, [-1.0] * len(ids), reason, version)


def test_turns_share_one_budget_and_know_what_the_tool_wrote() -> None:
    turns = Turns(FIRST, "?", max_calls=2)
    assert turns.request() == GenerateRequest(3, [1, 2], 8, 5, ["?"])
    assert turns.add_turn(answer([7, 8]), "a ?") and turns.add_observation([9])
    second = turns.request()
    assert (second.token_ids, second.max_tokens, second.stop) == ([1, 2, 7, 8, 9], 5, ["?"]) and second.seed != 5
    assert turns.add_turn(answer([7], version=6), "?") and turns.add_observation([]), "a tool may write nothing"
    third = turns.request()
    assert third.stop == [] and third.max_tokens == 4, "no pause after the last call"
    assert len({FIRST.seed, second.seed, third.seed}) == 3
    assert not turns.add_turn(answer([5, 2]), "b ? c")
    whole = turns.response("stop")
    assert (whole.token_ids, whole.policy_version, whole.finish_reason) == ([7, 8, 9, 7, 5, 2], 4, "stop")
    assert whole.logprobs == [-1.0, -1.0, 0.0, -1.0, -1.0, -1.0] and turns.observations == [(2, 3)]


def test_a_long_observation_is_truncated_and_ends_the_response() -> None:
    turns = Turns(FIRST, "?", max_calls=2)
    assert turns.add_turn(answer([7] * 6), "?") and not turns.add_observation([9] * 5)
    assert turns.observations == [(6, 8)] and len(turns.response("length").token_ids) == 8
    full = Turns(FIRST, "?", max_calls=2)
    assert not full.add_turn(answer([7] * 8, "length"), "?"), "no call is answered without room"


def test_only_tasks_with_a_tool_have_turns(tmp_path: Path) -> None:
    tools = ToolCalls({"with": "?"}, lambda prompt, text: Future(), lambda text: [], 3)
    client = RolloutClient(tmp_path, RolloutConfig(), 64, run_seed=7, decode=str, tools=tools)
    first, second = client.plan([Prompt("a", (1,), "", "", "with"), Prompt("b", (1,), "", "", "without")], 1, 1)
    assert first.request.stop == ["?"] and first.turns is not None and second.turns is None
    plain = RolloutClient(tmp_path, RolloutConfig(), 64, run_seed=7, decode=str)
    assert [item.request for item in plain.plan([first.prompt, second.prompt], 1, 1)] == [
        GenerateRequest(0, [1], 63, first.request.seed),
        second.request,
    ]


def test_turns_may_be_sampled_under_different_weights() -> None:
    """A push may come during a turn, or between two of them; what the tool wrote is of no version."""
    turns = Turns(FIRST, "?", max_calls=2)
    turns.add_turn(Response(3, [7, 8], [-1.0] * 2, "stop", 4, version_changes=[(1, 5)]), "?")
    turns.add_observation([9])
    turns.add_turn(answer([7], version=5), "?")
    turns.add_observation([])
    turns.add_turn(Response(3, [5, 6, 2], [-1.0] * 3, "stop", 6, version_changes=[(2, 7)]), "")
    whole = turns.response("stop")
    assert (whole.policy_version, whole.version_changes) == (4, [(1, 5), (4, 6), (6, 7)])
    rollout = Rollout(
        prompt=Prompt("a", (1,), "", "", "with"),
        sample_index=0,
        seed=5,
        response_ids=whole.token_ids,
        response_text="",
        rollout_logprobs=whole.logprobs,
        finish_reason="stop",
        policy_version=whole.policy_version,
        observations=turns.observations,
        version_changes=whole.version_changes,
    )
    assert [*rollout.versions()] == [(4, 1), (5, 2), (6, 2), (7, 1)]


def test_a_request_keeps_the_version_that_its_first_turn_began_under(tmp_path: Path) -> None:
    tools = ToolCalls({"with": "?"}, lambda prompt, text: Future(), lambda text: [], 3)
    client = RolloutClient(tmp_path, RolloutConfig(), 64, run_seed=7, decode=str, tools=tools)
    item = client.plan([Prompt("a", (1,), "", "", "with")], 1, 1)[0]
    item.begun_under = 3
    item.begin_again()
    assert item.begun_under is None, "its first turn was lost"
    item.begun_under = 3
    assert item.turns is not None
    item.turns.add_turn(answer([7], version=4), "?")
    item.begin_again()
    assert item.begun_under == 4, "a later one was"


def test_experts_of_a_turn_are_those_that_the_turns_before_lack() -> None:
    """An engine runs every token but the last one; the next turn's prompt has it, and what the tool wrote."""
    turns = Turns(FIRST, "?", max_calls=2)
    assert turns.request().num_routed == 0
    turns.add_turn(Response(3, [7, 8], [-1.0] * 2, "stop", 4, routed_experts=b"abc"), "?")
    turns.add_observation([9, 9])
    assert turns.request().num_routed == 3
    turns.add_turn(Response(3, [5], [-1.0], "stop", 4, routed_experts=b"def"), "")
    assert turns.response("stop").routed_experts == b"abcdef", "7 tokens but the last one"
