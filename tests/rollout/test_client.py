"""Which requests the client makes, and the rollouts that responses make of them."""

from pathlib import Path

from megatron_vcppo.config import RolloutConfig
from megatron_vcppo.records import Prompt
from megatron_vcppo.rollout.client import RolloutClient
from megatron_vcppo.rollout.messages import Response

PROMPT = Prompt("chain/1", (1, 12, 40), "3 + 4 ?", "7", "running_sum")


def make_client(folder: Path, max_tokens: int) -> RolloutClient:
    config = RolloutConfig(max_tokens=max_tokens)
    return RolloutClient(folder, config, 64, run_seed=7, decode=lambda ids: " ".join(map(str, ids)))


def test_a_response_in_windows_is_that_of_all_its_tokens(tmp_path: Path) -> None:
    """Two windows of four tokens, weights pushed between them and within the second one, then the end."""
    client = make_client(tmp_path, max_tokens=10)
    (whole,) = client.plan([PROMPT], 3, 1)
    first = client.plan_window(0, PROMPT, 0, 3, None, 4)
    assert (first.request.token_ids, first.request.seed, first.request.max_tokens) == (
        whole.request.token_ids, whole.request.seed, 4
    )  # fmt: skip
    begun = first.rollout(Response(0, [5, 6, 7, 8], [-1.0, -2.0, -3.0, -4.0], "length", 2), client.decode)
    assert begun.unfinished and not begun.truncated and begun.num_trained == 0

    second = client.plan_window(0, PROMPT, 0, 3, begun, 4)
    assert second.request.token_ids == [1, 12, 40, 5, 6, 7, 8] and second.request.max_tokens == 4
    assert second.request.seed != first.request.seed and second.request_id == first.request_id == whole.request_id
    more = second.rollout(Response(0, [9, 10, 11, 12], [-5.0] * 4, "length", 3, [(1, 4)]), client.decode)
    assert more.unfinished and more.continues(begun) and not more.continues(None) and not begun.continues(more)
    assert more.version_changes == ((4, 3), (5, 4)) and list(more.versions()) == [(3, 1), (4, 3)]

    last = client.plan_window(0, PROMPT, 0, 3, more, 4)
    assert last.request.max_tokens == 2, "room for ten tokens in all"
    done = last.rollout(Response(0, [13, 14], [-6.0, -7.0], "length", 4), client.decode)
    assert done.truncated and not done.unfinished
    assert [*done.response_ids] == [
        5,
        6,
        7,
        8,
        9,
        10,
        11,
        12,
        13,
        14,
    ] and done.response_text == "5 6 7 8 9 10 11 12 13 14"
    assert [*done.rollout_logprobs] == [-1.0, -2.0, -3.0, -4.0, -5.0, -5.0, -5.0, -5.0, -6.0, -7.0]
    assert (done.seed, done.policy_version, done.num_trained) == (whole.request.seed, 2, 8)
    assert done.version_changes == ((4, 3), (5, 4)) and list(done.versions()) == [(4, 2)]


def test_a_response_longer_than_a_lowered_limit_gets_its_last_token(tmp_path: Path) -> None:
    client = make_client(tmp_path, max_tokens=10)
    begun = client.plan_window(0, PROMPT, 0, 1, None, 4).rollout(
        Response(0, [5, 6, 7, 8], [-1.0] * 4, "length", 0), client.decode
    )
    item = make_client(tmp_path, max_tokens=3).plan_window(0, PROMPT, 0, 1, begun, 4)
    assert (item.request.max_tokens, item.rest) == (1, 0)


def test_windows_ask_only_for_the_experts_that_are_missing(tmp_path: Path) -> None:
    """One byte for a token: 3 of the prompt and 2 sampled ones, of which the last has none yet; then two more."""
    client = make_client(tmp_path, max_tokens=10)
    begun = client.plan_window(0, PROMPT, 0, 1, None, 2).rollout(
        Response(0, [5, 6], [-1.0] * 2, "length", 0, routed_experts=b"abcd"), client.decode
    )
    second = client.plan_window(0, PROMPT, 0, 1, begun, 2)
    assert second.request.num_routed == 4
    done = second.rollout(Response(0, [7, 8], [-1.0] * 2, "stop", 1, routed_experts=b"ef"), client.decode)
    assert done.routed_experts == b"abcdef", "of 7 tokens all but the last"


def test_experts_of_a_part_of_a_response_are_those_of_none(tmp_path: Path) -> None:
    """Routing replay is switched off for a window, and on again: the engine sends the experts of every token."""
    client = make_client(tmp_path, max_tokens=10)
    begun = client.plan_window(0, PROMPT, 0, 1, None, 2).rollout(
        Response(0, [5, 6], [-1.0] * 2, "length", 0, routed_experts=b"abcd"), client.decode
    )
    more = client.plan_window(0, PROMPT, 0, 1, begun, 2).rollout(
        Response(0, [7, 8], [-1.0] * 2, "length", 1), client.decode
    )
    assert more.unfinished and not more.routed_experts
    last = client.plan_window(0, PROMPT, 0, 1, more, 2)
    assert last.request.num_routed == 0
    done = last.rollout(Response(0, [9], [-1.0], "stop", 2, routed_experts=b"ABCDEFG"), client.decode)
    assert done.routed_experts == b"ABCDEFG" and len(done.prompt.token_ids) + len(done.response_ids) == 8
