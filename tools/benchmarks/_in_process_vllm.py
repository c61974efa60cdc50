"""Child of the rollout benchmark: vLLM's LLM class, without any server, under the settings of an engine.

Reads one JSON object per line ({"prompts": […], "max_tokens": …, "seeded": …}), generates, and writes the seconds and
the processor seconds that it took.
"""

import importlib
import json
import os
import sys
import time


def main() -> None:
    """Serve standard input until it ends."""
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR")
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not mix with answers
    vllm = importlib.import_module("vllm")  # the package must not import it; this baseline may

    model, max_length, max_num_seqs, dtype = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    llm = vllm.LLM(
        model=model,
        dtype=dtype,
        max_model_len=max_length,
        max_num_seqs=max_num_seqs,
        enforce_eager=True,
        logprobs_mode="processed_logprobs",
        disable_log_stats=True,
        distributed_executor_backend="uni",
    )
    answers.write("ready\n")
    for line in sys.stdin:
        task = json.loads(line)
        prompts = [{"prompt_token_ids": ids} for ids in task["prompts"]]
        params = [
            vllm.SamplingParams(temperature=1.0, max_tokens=task["max_tokens"], ignore_eos=True, logprobs=0,
                           detokenize=False, seed=index if task["seeded"] else None)
            for index in range(len(prompts))
        ]  # fmt: skip
        began, cpu_began = time.perf_counter(), time.process_time()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu_began
        num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        answers.write(json.dumps({"seconds": seconds, "cpu_s": cpu_s, "num_tokens": num_tokens}) + "\n")


if __name__ == "__main__":
    main()
