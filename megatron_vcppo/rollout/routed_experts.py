"""The experts that an engine without accelerators chose, for routing replay: what vLLM has for GPUs only.

vLLM returns them (``--enable-return-routed-experts``) from its second model runner, which needs Triton; vLLM 0.32
refuses the option on CPU ("Model Runner V2 requires Triton"). Here its own capturer, which hooks onto the routers, is
read out around the first runner. No prefix may be cached: of tokens that are not computed nothing is captured.
"""

from typing import Any

import numpy as np
from vllm.distributed.aux_output_connector.connector import AuxRequestOutput
from vllm.model_executor.layers.fused_moe.routed_experts_capturer import (
    RoutedExpertsCapturer,
    bind_routed_experts_capturer,
)
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.worker.cpu_worker import CPUWorker

from megatron_vcppo.rollout.final_output import FinalOutputScheduler


class CapturingWorker(CPUWorker):
    """A worker whose outputs have the experts of every token of the step."""

    def load_model(self, **kwargs: Any) -> None:
        """Hook onto the routers, which outlive every push."""
        super().load_model(**kwargs)
        self.capturer = RoutedExpertsCapturer(self.scheduler_config.max_num_batched_tokens, self.vllm_config)
        bind_routed_experts_capturer(self.model_runner.get_model(), self.capturer)

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        """The forward pass."""
        output = super().execute_model(scheduler_output)
        self.captured = self._captured(scheduler_output)
        return self._with_experts(output)

    def sample_tokens(self, grammar_output: Any) -> Any:
        """What follows it."""
        return self._with_experts(super().sample_tokens(grammar_output))

    def _captured(self, scheduler_output: SchedulerOutput) -> dict[str, AuxRequestOutput]:
        """By request: the place of its first token of this step, and a row per token."""
        rows = self.capturer.snapshot_routing_data(scheduler_output.total_num_scheduled_tokens).numpy()
        batch, found, start = self.model_runner.input_batch, {}, 0
        for index, name in enumerate(batch.req_ids):
            end = start + scheduler_output.num_scheduled_tokens[name]
            found[name] = AuxRequestOutput(int(batch.num_computed_tokens_cpu[index]), rows[start:end])
            start = end
        return found

    def _with_experts(self, output: Any) -> Any:
        if isinstance(output, ModelRunnerOutput) and output.req_ids:
            output.aux_output_connector_output = self.captured
        return output


class CapturedExperts:
    """In the scheduler: from the rows of a step to those that a response lacks. In the place of vLLM's connector.

    A token keeps the experts of its first pass; what is computed again after a preemption or a push adds none.
    """

    def __init__(self) -> None:
        self.num_emitted: dict[str, int] = {}
        """Tokens of each running request whose experts are handed out."""

    def build_connector_meta(self, scheduler_output: SchedulerOutput, requests: dict[str, Request]) -> None:
        """Workers need to be told nothing."""

    def take_output(self, request: Request, output: dict[str, AuxRequestOutput] | None) -> np.ndarray:
        """[tokens, layers, K] of the tokens that were computed for the first time."""
        assert output is not None and request.sampling_params is not None
        step = output[request.request_id]
        first = min(request.sampling_params.routed_experts_prompt_start, request.num_prompt_tokens)
        start, end = self.num_emitted.get(request.request_id, first), request.num_tokens - 1
        assert step.token_start <= start <= end, f"experts from {step.token_start}, wanted from {start} to {end}"
        self.num_emitted[request.request_id] = end
        return step.rows[start - step.token_start : end - step.token_start]

    def request_finished(self, request: Request) -> None:
        """Forget it."""
        self.num_emitted.pop(request.request_id, None)

    def reset(self) -> None:
        """A push: running requests continue, and keep what they have."""


class CapturingScheduler(FinalOutputScheduler):
    """Hands out a finished response's experts with it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.aux_output_connector: Any = CapturedExperts()
