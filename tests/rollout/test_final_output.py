"""Responses are held back until they are finished: whole, and at a few bytes per token."""

import tracemalloc
from types import SimpleNamespace
from typing import Any

import numpy as np
from vllm.distributed.aux_output_connector.connector import AuxRequestOutput
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.outputs import LogprobsLists

from megatron_vcppo.rollout.final_output import Unfinished
from megatron_vcppo.rollout.routed_experts import CapturedExperts


def step_output(token: int, batch: int, finished: bool = False) -> EngineCoreOutput:
    """One request's part of a step over ``batch`` requests: views of the step's arrays, as vLLM slices them."""
    ids, logprobs = np.full((batch, 1), token, np.int32), np.full((batch, 1), -token / 7, np.float32)
    step = LogprobsLists(ids, logprobs, np.full(batch, token % 5, np.int32), None)
    reason = FinishReason.STOP if finished else None
    return EngineCoreOutput("r", [token], new_logprobs=step.slice_request(1, 1), finish_reason=reason)


def test_a_finished_response_has_the_tokens_and_logprobs_of_every_step() -> None:
    outputs = [step_output(token, batch=4, finished=token == 9) for token in range(3, 10)]
    unfinished = Unfinished(outputs[0])
    for output in outputs:
        unfinished.add(output)
    whole = unfinished.finish(outputs[-1])
    assert whole.new_token_ids == list(range(3, 10)) and whole.finish_reason == FinishReason.STOP
    assert whole.new_logprobs is not None
    np.testing.assert_array_equal(whole.new_logprobs.logprob_token_ids, np.arange(3, 10, dtype=np.int32)[:, None])
    np.testing.assert_allclose(whole.new_logprobs.logprobs, -np.arange(3, 10, dtype=np.float32)[:, None] / 7)
    np.testing.assert_array_equal(whole.new_logprobs.sampled_token_ranks, np.arange(3, 10) % 5)


def test_an_unfinished_response_costs_some_bytes_per_token() -> None:
    tokens, batch = 4096, 64
    tracemalloc.start()
    try:
        unfinished = Unfinished(step_output(0, batch))
        before, _ = tracemalloc.get_traced_memory()
        for token in range(tokens):
            unfinished.add(step_output(token, batch))
        held = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert held / tokens < 40, f"{held / tokens:.0f} bytes per token"


def test_a_finished_response_has_the_experts_of_every_step() -> None:
    """The first step has those of the prompt."""
    rows = np.arange(7 * 2 * 2, dtype=np.uint16).reshape(7, 2, 2)
    outputs = [step_output(token, batch=2, finished=token == 4) for token in range(2, 5)]
    for output, part in zip(outputs, (rows[:5], rows[5:6], rows[6:]), strict=True):
        output.routed_experts = part
    unfinished = Unfinished(outputs[0])
    for output in outputs:
        unfinished.add(output)
    whole = unfinished.finish(outputs[-1])
    assert whole.routed_experts is not None and whole.routed_experts.dtype == np.uint16
    np.testing.assert_array_equal(whole.routed_experts, rows)


def fake_request(num_prompt: int, num_tokens: int, num_routed: int = 0) -> Any:
    params = SimpleNamespace(routed_experts_prompt_start=num_routed)
    return SimpleNamespace(request_id="r", num_prompt_tokens=num_prompt, num_tokens=num_tokens, sampling_params=params)


def test_a_token_keeps_the_experts_of_its_first_pass() -> None:
    """After a push, or a preemption, a running request is computed again from its first token."""
    captured = CapturedExperts()

    def rows(start: int, end: int, offset: int = 0) -> dict[str, AuxRequestOutput]:
        return {"r": AuxRequestOutput(start, np.arange(start + offset, end + offset)[:, None, None])}

    steps = [(rows(0, 5), 6), (rows(5, 6), 7), (rows(0, 7, offset=100), 8), (rows(7, 8), 9)]
    found = [captured.take_output(fake_request(5, num_tokens), output) for output, num_tokens in steps]
    assert np.concatenate(found).ravel().tolist() == [0, 1, 2, 3, 4, 5, 106, 7]
    captured.request_finished(fake_request(5, 9))
    again = captured.take_output(fake_request(5, 6, num_routed=3), rows(0, 5))
    assert again.ravel().tolist() == [3, 4], "a later turn: those of the first tokens came with the turn before"
