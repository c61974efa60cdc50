"""A vLLM scheduler that hands out a response once, when it is finished, instead of token by token.

Nobody reads the tokens of an unfinished rollout, yet each one costs the engine a message to the API server, which
decodes it, books it and competes with the model for the CPU. Holding them back is what makes generation over HTTP
as fast as generation in the process (``tools/bench.py rollout`` measures both).
"""

from array import array
from collections.abc import Iterable
from typing import Any

import numpy as np
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from megatron_vcppo.rollout.messages import PUSHES

Base: Any = Scheduler if current_platform.is_cpu() else AsyncScheduler  # vLLM schedules synchronously on CPU


class FinalOutputScheduler(Base):
    """vLLM's scheduler, with the outputs of final-only requests held back until they finish."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.held: dict[str, Unfinished] = {}
        self.pushes: dict[str, list[int]] = {}
        """Of each request that weights were pushed during: how many tokens it had at each push."""

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """The end of a push: with ``reset_running_requests``, what runs continues under other weights."""
        if reset_running_requests:
            for name, request in self.requests.items():
                if request.num_output_tokens:
                    self.pushes.setdefault(name, []).append(request.num_output_tokens)
        return super().reset_prefix_cache(reset_running_requests, reset_connector)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """What this step has to tell each API server: finished responses, whole."""
        holdable = {name for name in scheduler_output.num_scheduled_tokens if self._is_holdable(name)}
        step = super().update_from_output(scheduler_output, model_runner_output)
        for client, outputs in list(step.items()):
            outputs.outputs = [whole for output in outputs.outputs if (whole := self._hold(output, holdable))]
            for output in outputs.outputs:
                if output.finished and (pushes := self.pushes.pop(output.request_id, None)):
                    output.kv_transfer_params = {**(output.kv_transfer_params or {}), PUSHES: pushes}
            if not outputs.outputs and outputs.scheduler_stats is None and outputs.finished_requests is None:
                del step[client]
        return step

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> list[Request]:
        """Forget what was held for requests that end from outside (aborted)."""
        finished = super().finish_requests(request_ids, finished_status)
        for request in finished:
            self.held.pop(request.request_id, None)
            self.pushes.pop(request.request_id, None)
        return finished

    def _is_holdable(self, request_id: str) -> bool:
        """Stop strings are looked for in the API server, which therefore needs every token as it comes."""
        request = self.requests.get(request_id)
        params = request.sampling_params if request else None
        return params is not None and params.output_kind == RequestOutputKind.FINAL_ONLY and not params.stop

    def _hold(self, output: EngineCoreOutput, holdable: set[str]) -> EngineCoreOutput | None:
        if output.request_id not in holdable:
            return output
        unfinished = self.held.get(output.request_id)
        if unfinished is None:
            unfinished = self.held[output.request_id] = Unfinished(output)
        unfinished.add(output)
        if not output.finished:
            return None
        del self.held[output.request_id]
        return unfinished.finish(output)


class Unfinished:
    """Tokens and log-probs of a response so far, as plain numbers.

    One output object per token, each with three views of arrays of its step, would cost about 750 bytes per token:
    1.6 GB for 128 responses of 16K tokens.
    """

    def __init__(self, first: EngineCoreOutput) -> None:
        self.prefill_stats = first.prefill_stats
        self.token_ids = array("q")
        self.logprobs = (bytearray(), bytearray(), bytearray())
        """Token ids, log-probs and ranks of vLLM's LogprobsLists, row after row."""
        self.routed_experts = bytearray()
        """Of every token in turn, if the engine captures them."""

    def add(self, output: EngineCoreOutput) -> None:
        """Append the tokens of one step."""
        self.token_ids.extend(output.new_token_ids)
        if output.new_logprobs is not None:
            for column, rows in zip(self.logprobs, output.new_logprobs[:3], strict=True):
                column += rows.tobytes()
        if output.routed_experts is not None:
            self.routed_experts += output.routed_experts.tobytes()

    def finish(self, last: EngineCoreOutput) -> EngineCoreOutput:
        """The last step's output with tokens, log-probs and experts of all steps, and the prefill figures of the
        first."""
        last.new_token_ids = self.token_ids.tolist()
        if last.new_logprobs is not None:
            columns = [
                np.frombuffer(column, rows.dtype).reshape(-1, *rows.shape[1:])
                for column, rows in zip(self.logprobs, last.new_logprobs[:3], strict=True)
            ]
            last.new_logprobs = LogprobsLists(*columns, None)
        if last.routed_experts is not None:
            rows = last.routed_experts
            last.routed_experts = np.frombuffer(self.routed_experts, rows.dtype).reshape(-1, *rows.shape[1:])
        last.prefill_stats = self.prefill_stats
        return last
