"""Responses are held back until they are finished: whole, and at a few bytes per token."""

import tracemalloc

import numpy as np
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.outputs import LogprobsLists

from megatron_vcppo.rollout.final_output import Unfinished


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
