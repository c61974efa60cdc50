"""A vLLM scheduler that hands out a response once, when it is finished, instead of token by token.

Nobody reads the tokens of an unfinished rollout, yet each one costs the engine a message to the API server, which
decodes it, books it and competes with the model for the CPU. Holding them back is what makes generation over HTTP
as fast as generation in the process (``tools/bench.py rollout`` measures both).
"""

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

Base: Any = Scheduler if current_platform.is_cpu() else AsyncScheduler  # vLLM schedules synchronously on CPU


class FinalOutputScheduler(Base):
    """vLLM's scheduler, with the outputs of final-only requests held back until they finish."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.held: dict[str, list[EngineCoreOutput]] = {}

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """What this step has to tell each API server: finished responses, whole."""
        holdable = {name for name in scheduler_output.num_scheduled_tokens if self._is_holdable(name)}
        step = super().update_from_output(scheduler_output, model_runner_output)
        for client, outputs in list(step.items()):
            outputs.outputs = [whole for output in outputs.outputs if (whole := self._hold(output, holdable))]
            if not outputs.outputs and outputs.scheduler_stats is None and outputs.finished_requests is None:
                del step[client]
        return step

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> list[Request]:
        """Forget what was held for requests that end from outside (aborted)."""
        finished = super().finish_requests(request_ids, finished_status)
        for request in finished:
            self.held.pop(request.request_id, None)
        return finished

    def _is_holdable(self, request_id: str) -> bool:
        """Stop strings are looked for in the API server, which therefore needs every token as it comes."""
        request = self.requests.get(request_id)
        params = request.sampling_params if request else None
        return params is not None and params.output_kind == RequestOutputKind.FINAL_ONLY and not params.stop

    def _hold(self, output: EngineCoreOutput, holdable: set[str]) -> EngineCoreOutput | None:
        if output.request_id not in holdable:
            return output
        parts = self.held.setdefault(output.request_id, [])
        parts.append(output)
        if not output.finished:
            return None
        del self.held[output.request_id]
        return _merge(parts)


def _merge(parts: list[EngineCoreOutput]) -> EngineCoreOutput:
    """One output with the tokens and log-probs of all; the rest is the last one's, prefill figures the first one's."""
    last = parts[-1]
    last.new_token_ids = [token for part in parts for token in part.new_token_ids]
    logprobs = [part.new_logprobs for part in parts if part.new_logprobs is not None]
    if logprobs:
        last.new_logprobs = LogprobsLists(*(np.concatenate([lists[i] for lists in logprobs]) for i in range(3)), None)
    last.prefill_stats = parts[0].prefill_stats
    return last
