"""TRL's side of ``bench.py ppo_peer``: its PPOTrainer, run by the Python of an environment that has TRL.

Reads a job (see ``ppo_peer.py``) as JSON from stdin, trains, and prints one JSON object as its last line: seconds and
response tokens per iteration, seconds per phase. Imports nothing of this project.
"""

import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LogitsProcessor,
    LogitsProcessorList,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer


class NoReference(nn.Module):
    """In place of the reference model, without which PPOTrainer refuses to start: logits 0, multiplied by kl_coef 0."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        """input_ids: [B, T]."""
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, self.vocab_size))


class TokenReward(nn.Module):
    """In place of the reward model, which PPOTrainer requires: +1 or -1 by the last token's id, at no cost."""

    base_model_prefix = "backbone"

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.score = self.Parity(), nn.Identity()

    class Parity(nn.Module):
        """Odd tokens are good."""

        def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
            """input_ids: [B, T]."""
            return SimpleNamespace(hidden_states=(input_ids.remainder(2).mul(2).sub(1).float()[..., None],))


class EndAt(LogitsProcessor):
    """The end token is chosen as the last one of each response's given length, and not before."""

    def __init__(self, lengths: list[int], prompt_tokens: int, eos_token_id: int) -> None:
        self.lengths, self.prompt_tokens, self.eos_token_id = torch.tensor(lengths), prompt_tokens, eos_token_id

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids: [B, T] so far; scores: [B, vocabulary]."""
        last = self.lengths <= input_ids.shape[1] - self.prompt_tokens + 1
        scores[last] = -torch.inf
        scores[:, self.eos_token_id] = torch.where(last, 0.0, -torch.inf)
        return scores


def ending_at(generate: Callable[..., Any], lengths: list[int], eos_token_id: int) -> Callable[..., Any]:
    """A model's ``generate`` whose responses have these lengths, batch after batch."""
    left = iter(lengths)

    def generate_lengths(*, input_ids: Tensor, **options: Any) -> Any:
        batch = [next(left) for _ in input_ids]
        ends = LogitsProcessorList([EndAt(batch, input_ids.shape[1], eos_token_id)])
        return generate(input_ids=input_ids, logits_processor=ends, **options)

    return generate_lengths


class Clock(TrainerCallback):
    """Seconds and response tokens of each iteration; phases are measured by wrapping what PPOTrainer calls."""

    def __init__(self, until_eos: bool) -> None:
        self.until_eos = until_eos
        self.iterations: list[dict[str, float]] = []
        self.phases: dict[str, float] = defaultdict(float)
        self.tokens = 0
        self.began = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """The first iteration begins."""
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """An iteration is over, and the next one begins."""
        now = time.perf_counter()
        seconds = now - self.began
        rest = seconds - sum(self.phases.values())
        self.iterations.append({"iteration": seconds, "update": rest, "tokens": self.tokens, **self.phases})
        self.phases.clear()
        self.tokens, self.began = 0, now

    def measure(self, name: str, phase: str) -> None:
        """Count the time in a function of TRL's module."""
        function = getattr(ppo_trainer, name)

        def measured(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = function(*args, **kwargs)
            self.phases[phase] += time.perf_counter() - began
            if phase == "generation":
                self.count(queries=args[1], pad_token_id=args[3], query_responses=result[0])
            return result

        setattr(ppo_trainer, name, measured)

    def count(self, queries: Tensor, pad_token_id: int, query_responses: Tensor) -> None:
        """Add up response tokens: all that were sampled, or those before padding."""
        responses = query_responses[:, queries.shape[1] :]
        self.tokens += int((responses != pad_token_id).sum()) if self.until_eos else responses.numel()


def train(job: dict[str, Any]) -> Clock:
    """The settings that cost least: the whole batch in each forward pass, no checkpointing, no reference model."""
    torch.set_num_threads(job["threads"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"], padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    if job["lengths"]:
        policy.generate = ending_at(policy.generate, job["lengths"], tokenizer.eos_token_id)
    value = AutoModelForSequenceClassification.from_pretrained(job["model"], dtype=torch.float32, num_labels=1)
    config = PPOConfig(
        output_dir=job["folder"],
        learning_rate=job["learning_rate"],
        per_device_train_batch_size=job["batch"],
        gradient_accumulation_steps=1,  # then each minibatch is one optimizer step, as on our side
        local_rollout_forward_batch_size=job["batch"],
        num_mini_batches=job["minibatches"],
        num_ppo_epochs=job["ppo_epochs"],
        total_episodes=len(job["prompts"]),
        response_length=job["new_tokens"],
        stop_token="eos" if job["until_eos"] else None,
        temperature=1.0,
        kl_coef=0.0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        num_sample_generations=0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    clock = Clock(job["until_eos"])
    clock.measure("batch_generation", "generation")
    clock.measure("get_reward", "values")
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=NoReference(policy.config.vocab_size),
        reward_model=TokenReward(),
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": job["prompts"]}),
        callbacks=[clock],
    )
    trainer.train()
    return clock


if __name__ == "__main__":
    clock = train(json.load(sys.stdin))
    print(json.dumps(clock.iterations))
