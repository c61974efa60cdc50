"""The rewards of a neural reward model: a frozen model on the trainer's ranks, scored between rollouts and values.

Each replica scores its shard of the responses, under any layout. Scores are stored with the rollouts, so an iteration
that is trained again has the ones that it had; normalization and weights are applied when the batch is used, and its
running moments are a part of the checkpoint.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from megatron_vcppo.algo.model_rewards import (
    RunningMoments,
    model_reward_metrics,
    model_rewards,
    summarize_model_rewards,
)
from megatron_vcppo.config import Config, LoraConfig
from megatron_vcppo.data.bad_samples import BadSample
from megatron_vcppo.data.mixture import training_sources
from megatron_vcppo.data.packer import Packer
from megatron_vcppo.data.packing import unpack_all
from megatron_vcppo.data.prompt_format import render_chat
from megatron_vcppo.data.rollout_share import RolloutShare
from megatron_vcppo.data.tokenizer import encode_texts, load_tokenizer, splits_alike
from megatron_vcppo.errors import UserError
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.hf.reward_model import (
    OTHER_TOKENIZER,
    check_reward_model,
    reward_architecture,
    under_path_key,
    uses_reward_model,
)
from megatron_vcppo.mcore import runtime
from megatron_vcppo.mcore.hf_weights_io import load_reward_model
from megatron_vcppo.mcore.learner import FrozenValues
from megatron_vcppo.mcore.model import CriticModel, build_critic
from megatron_vcppo.mcore.row_exchange import broadcast_in_replica
from megatron_vcppo.mcore.starting_weights import load_component, lora_of
from megatron_vcppo.records import Prompt, Rollout, RolloutPart, TrainSequence
from megatron_vcppo.run.log import say
from megatron_vcppo.stages.initial_models import check_same_model
from megatron_vcppo.stages.loop import Stateful
from megatron_vcppo.stages.rollout_session import RolloutSession
from megatron_vcppo.stages.stage import Stage, reward_model_folder

ReadIds = Callable[[Rollout], Sequence[int]]
"""The tokens that the reward model reads of a rollout; it gives its score at the last one."""


class ModelRewards:
    """Scores rollouts, and adds the scores to the verifiers' rewards of a batch; every rank does the same."""

    def __init__(self, stage: Stage, session: RolloutSession) -> None:
        """Load the model. Raises UserError if the folder is no reward model, or cannot read what the policy writes."""
        config = stage.config
        self.settings, self.packer, self.session = config.rewards.model, stage.packer, session
        self.read_ids: ReadIds = policy_tokens
        if self.settings.path is not None:
            check_reward_model(config)
            self.read_ids = reader_of(self.settings.path, self.settings.input, session.tokenizer)
            if self.settings.input == "chat":
                sources = training_sources(config.prompts.train, config.prompts.mix)
                check_texts([prompt for source in sources for prompt in session.prompts(source)], session.tokenizer)
        self.runner = FrozenValues(load(config))
        session.share(self.runner)
        self.moments = RunningMoments()

    @classmethod
    def of(cls, stage: Stage, session: RolloutSession) -> "ModelRewards | None":
        """Those of the stage; None if verifiers alone reward its responses."""
        return cls(stage, session) if uses_reward_model(stage.config, stage.name) else None

    def score(self, part: RolloutPart) -> RolloutPart:
        """The rollouts of this rank with their scores; collective. Those that have one keep it.

        Each replica scores what its leader has. Raises UserError on every rank for a score that is not finite.
        """
        missing = [index for index, rollout in enumerate(part.rollouts) if rollout.model_score is None]
        if runtime.sum_over_ranks(len(missing)) == 0:
            return part
        self.session.trainer_turn()
        read = [self.read_ids(part.rollouts[index]) for index in missing]
        scores = score_replica(self.runner, read, self.packer)
        scored, problem = list(part.rollouts), ""
        for index, score in zip(missing, scores, strict=False):  # other ranks than the leader have scores, no rollouts
            if not math.isfinite(score):
                problem = f"the score of a response to {scored[index].prompt.prompt_id} is {score}: check its weights"
            scored[index] = replace(scored[index], model_score=score)
        for _, text in self.session.sync.ranks.texts(problem):
            raise UserError(f"rewards.model: {text}")
        return RolloutPart(part.places, scored)

    def add_to(self, share: RolloutShare) -> tuple[RolloutShare, dict[str, float]]:
        """The share with weighted sums of both rewards, and metrics of the model's; call it once per batch."""
        settings, batch = self.settings, share.batch
        scores = batch.model_scores
        self.moments = self.moments.add(scores)
        moments = self.moments if settings.normalize == "running" else None
        rewards = model_rewards(scores, moments, settings.clip)
        metrics = model_reward_metrics(
            scores=scores,
            rewards=rewards,
            clip=settings.clip,
            verdicts=batch.rewards,
            is_correct=batch.is_correct,
            lengths=batch.lengths,
        )
        combined = settings.verifier_weight * batch.rewards.double() + settings.weight * rewards
        return replace(share, batch=batch.with_rewards(combined.float())), summarize_model_rewards(metrics)

    def state_dict(self) -> dict[str, Any]:
        """The running moments."""
        return asdict(self.moments)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with them."""
        self.moments = RunningMoments(**state)


def tracked(model_rewards: ModelRewards | None) -> dict[str, Stateful]:
    """What TrainLoop.track takes of them."""
    return {} if model_rewards is None else {"model_rewards": model_rewards}


def load(config: Config) -> CriticModel:
    """The reward model on this rank, in model.dtype, without 8-bit products. Raises UserError as ``ModelRewards``."""
    folder, path = reward_model_folder(config), config.rewards.model.path
    assert folder is not None, "called for a run with a reward model"
    arch = reward_architecture(config, Architecture.from_hf(config.model.hf))
    lora = lora_of(folder) if path is None else LoraConfig()
    model = build_critic(arch, replace(config.model, fp8="off", lora=lora), config.parallel)
    if path is None:
        check_same_model(folder, arch)
        load_component(model, folder, Path(config.model.hf))
    else:
        under_path_key(lambda: load_reward_model(model, folder))
    return model


def score_replica(model: FrozenValues, token_ids: Sequence[Sequence[int]], packer: Packer) -> list[float]:
    """The scores of what this replica's leader has, on all its ranks; collective over all ranks.

    token_ids: what the model reads; those of the leader count. One that is longer than the model's positions is read
    from where it fits; a warning says how many were.
    """
    max_positions = model.model.arch.max_positions
    num_long = runtime.sum_over_ranks(sum(len(ids) > max_positions for ids in token_ids))
    if model.runtime.is_main and num_long:
        say(
            f"warning: {num_long} responses are longer, as the reward model reads them, than its {max_positions} "
            "positions: it read their ends"
        )
    count = broadcast_in_replica(torch.tensor([len(token_ids)]))
    lengths = torch.zeros(int(count), dtype=torch.int64)
    if model.runtime.is_leader:
        token_ids = [ids[-max_positions:] for ids in token_ids]
        lengths = torch.tensor([*map(len, token_ids)], dtype=torch.int64)
    broadcast_in_replica(lengths)
    flat = torch.zeros(int(lengths.sum()), dtype=torch.int32)
    if model.runtime.is_leader and token_ids:
        flat = torch.from_numpy(np.concatenate([np.asarray(ids, np.int32) for ids in token_ids]))
    broadcast_in_replica(flat)
    return score_shard(model, [ids.tolist() for ids in flat.split(lengths.tolist())] if len(lengths) else [], packer)


def score_shard(model: FrozenValues, token_ids: Sequence[Sequence[int]], packer: Packer) -> list[float]:
    """The scores of this replica's sequences, at their last tokens; collective over its ranks. There may be none."""
    # Outputs belong to the token that follows; the last token has one more, which causal attention cannot see.
    microbatches = packer.pack([TrainSequence((*ids, 0)) for ids in token_ids])
    return [float(row[-1]) for row in unpack_all(microbatches, model.values(microbatches))]


def policy_tokens(rollout: Rollout) -> tuple[int, ...]:
    """Prompt and response as the policy has them."""
    return (*rollout.prompt.token_ids, *rollout.response_ids)


def check_texts(prompts: Sequence[Prompt], policy_tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError for a prompt that is a chat: what is known of it is its text in the policy's chat template."""
    special = [token for token in policy_tokenizer.all_special_tokens if token.strip()]
    for prompt in prompts:
        if any(token in prompt.text for token in special):
            raise UserError(
                f"rewards.model.input chat: the prompt {prompt.prompt_id} is a chat, or holds special tokens of "
                "model.hf; it needs prompts that are text: use input tokens and a model of the same tokenizer"
            )


def reader_of(path: str, kind: str, policy_tokenizer: PreTrainedTokenizerBase) -> ReadIds:
    """What a checkpoint reads of a rollout. kind: rewards.model.input.

    As transformers does, it is scored at the last token that is no padding: a padding token at the end, which is the
    end-of-text token in some checkpoints, does not count. Raises UserError if it cannot read what the policy writes.
    """
    tokenizer = under_path_key(lambda: load_tokenizer(path))
    padding = Architecture.from_hf(path).config.get("pad_token_id")
    if kind == "tokens":
        if not splits_alike(tokenizer, policy_tokenizer):
            raise UserError(f"rewards.model.path: {OTHER_TOKENIZER.format(folder=path)}")
        return lambda rollout: without_padding(policy_tokens(rollout), padding)
    if not tokenizer.chat_template:
        raise UserError(f"rewards.model.input chat: the tokenizer of {path} has no chat template")

    def read(rollout: Rollout) -> Sequence[int]:
        prompt = rollout.prompt
        chat = [{"role": "user", "content": prompt.text}, {"role": "assistant", "content": rollout.response_text}]
        try:
            text = render_chat(tokenizer, chat, for_response=False)
        except BadSample as error:
            raise UserError(f"rewards.model.input chat: {prompt.prompt_id}: {error}") from None
        return without_padding(encode_texts(tokenizer, [text], special=False)[0], padding)

    return read


def without_padding(ids: Sequence[int], padding: int | None) -> Sequence[int]:
    """Up to the last token that is not ``padding``; all if there is no other token."""
    end = len(ids)
    while end > 1 and ids[end - 1] == padding:
        end -= 1
    return ids[:end]
