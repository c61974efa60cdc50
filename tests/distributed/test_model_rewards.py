"""Scores of a reward model: those of transformers, the same for every layout; what is no reward model is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from megatron_vcppo.config import Config, ParallelConfig
from megatron_vcppo.data.packer import Packer
from megatron_vcppo.data.tokenizer import load_tokenizer
from megatron_vcppo.errors import UserError
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.hf.reward_model import check_reward_model
from megatron_vcppo.hf.safetensors_files import reward_model_tensors
from megatron_vcppo.mcore import runtime
from megatron_vcppo.mcore.learner import FrozenValues
from megatron_vcppo.records import Prompt, Rollout
from megatron_vcppo.stages.model_rewards import check_texts, load, reader_of, score_replica
from megatron_vcppo.tasks.base_model import write_base_model
from tests.helpers.distributed import run_distributed_test
from tests.helpers.reward_models import save_reward_model
from tests.helpers.training import make_sequences
from tools.benchmarks._tiny_models import save_tiny_model

LAYOUTS = {
    "dp2": (2, ParallelConfig()),
    "tp2": (2, ParallelConfig(tp=2)),
    "pp2": (2, ParallelConfig(pp=2)),
    "cp2": (2, ParallelConfig(cp=2)),
}


def rollout_of(ids: tuple[int, ...]) -> Rollout:
    half = len(ids) // 2
    return Rollout(Prompt("p", ids[:half], "", "", "t"), 0, 0, ids[half:], "", (-1.0,) * (len(ids) - half), "stop", 0)


def score(reward_model: Path, rollouts: list[Rollout], num_ranks: int, parallel: ParallelConfig) -> list[list[float]]:
    """By the leaders, which take the rollouts in turn: the scores that all ranks of each replica have, in order."""

    def body() -> list[tuple[int, float]]:
        joined = runtime.start(parallel, seed=3, timeout_s=60)
        config = Config(parallel=parallel)
        config.model.hf, config.model.dtype = str(reward_model), "float32"
        config.rewards.model.path = str(reward_model)
        packer = Packer.of(parallel, config.model, joined.dp_rank, joined.dp_size)
        places = range(joined.dp_rank, len(rollouts), joined.dp_size)
        mine = [(*rollouts[i].prompt.token_ids, *rollouts[i].response_ids) for i in places]
        scores = score_replica(FrozenValues(load(config)), mine if joined.is_leader else [], packer)
        return list(zip(places, scores, strict=True))

    by_rank = run_distributed_test(body, num_ranks)
    replicas = {tuple(place for place, _ in found): dict(found) for found in by_rank}
    assert all(dict(found) == replicas[tuple(place for place, _ in found)] for found in by_rank)
    scores = {place: score for found in replicas.values() for place, score in found.items()}
    return [[scores[place] for place in range(len(rollouts))]]


def expected_scores(reward_model: Path, rollouts: list[Rollout]) -> list[float]:
    model = AutoModelForSequenceClassification.from_pretrained(reward_model, dtype=torch.float32)
    ids = [torch.tensor([[*r.prompt.token_ids, *r.response_ids]]) for r in rollouts]
    with torch.no_grad():
        return [float(model(input_ids=x).logits) for x in ids]


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_moe", "llama"])
def test_scores_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    """pad_token_id is None, so that transformers, too, reads the last token of all."""
    reward_model = save_reward_model(tmp_path / "rm", save_tiny_model(tmp_path / "base", family), pad=None)
    rollouts = [rollout_of(tuple(sequence.token_ids)) for sequence in make_sequences(0, 7)]
    (found,) = score(reward_model, rollouts, 1, ParallelConfig())
    assert found == pytest.approx(expected_scores(reward_model, rollouts), abs=1e-4)
    assert max(found) - min(found) > 0.1


@pytest.mark.parametrize(("num_ranks", "parallel"), LAYOUTS.values(), ids=LAYOUTS)
def test_scores_do_not_depend_on_the_layout(tmp_path: Path, num_ranks: int, parallel: ParallelConfig) -> None:
    """Also with fewer responses than replicas."""
    reward_model = save_reward_model(tmp_path / "rm", save_tiny_model(tmp_path / "base"), pad=None)
    for count in (7, 1):
        rollouts = [rollout_of(tuple(sequence.token_ids)) for sequence in make_sequences(0, count)]
        for found in score(reward_model, rollouts, num_ranks, parallel):
            assert found == pytest.approx(expected_scores(reward_model, rollouts), abs=1e-5)


def test_a_long_response_is_read_from_where_it_fits(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base", max_position_embeddings=32)
    reward_model = save_reward_model(tmp_path / "rm", base, pad=None)
    ids = tuple(i % 60 for i in range(50))
    assert score(reward_model, [rollout_of(ids), rollout_of(ids[-32:])], 1, ParallelConfig())[0] == pytest.approx(
        expected_scores(reward_model, [rollout_of(ids[-32:])] * 2), abs=1e-4
    )


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    write_base_model(tmp_path / "policy")
    return tmp_path / "policy"


def test_chats_and_tokens_are_read_as_transformers_reads_them(tmp_path: Path, policy: Path) -> None:
    """Padding tokens at the end do not count; a chat is what the reward model's own template makes of the texts."""
    tokenizer = load_tokenizer(policy)
    words = [word for word in tokenizer.get_vocab() if word not in tokenizer.all_special_tokens][:12]
    pad = tokenizer.get_vocab()[words[0]]
    reward_model = save_reward_model(tmp_path / "rm", policy, pad=pad)
    own = AutoTokenizer.from_pretrained(reward_model)
    own.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    own.save_pretrained(reward_model)
    ids = tuple(tokenizer.convert_tokens_to_ids(words))
    rollout = Rollout(
        Prompt("p", ids[2:6], " ".join(words[2:6]), "", "t"), 0, 0, (*ids[6:], pad, pad), " ".join(words[6:]), (), "", 0
    )
    assert list(reader_of(str(reward_model), "tokens", tokenizer)(rollout)) == [*ids[2:6], *ids[6:]]
    text = own.apply_chat_template(
        [{"content": rollout.prompt.text}, {"content": rollout.response_text}], tokenize=False
    )
    read = list(reader_of(str(reward_model), "chat", tokenizer)(rollout))
    assert read == own(text, add_special_tokens=False)["input_ids"] and len(read) == 10
    whole = torch.tensor([[*rollout.prompt.token_ids, *rollout.response_ids]])
    model = AutoModelForSequenceClassification.from_pretrained(reward_model, dtype=torch.float32)
    with torch.no_grad():
        with_padding, without = float(model(input_ids=whole).logits), float(model(input_ids=whole[:, :-2]).logits)
    assert with_padding == pytest.approx(without, abs=1e-5), "transformers reads the token before the padding"


def test_what_cannot_read_the_policys_text_is_refused(tmp_path: Path, policy: Path) -> None:
    tokenizer = load_tokenizer(policy)
    reward_model = save_reward_model(tmp_path / "rm", policy)
    with pytest.raises(UserError, match=r"rewards\.model\.input chat: the tokenizer of .* has no chat template"):
        reader_of(str(reward_model), "chat", tokenizer)
    file = reward_model / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = [word for word in vocabulary if word not in tokenizer.all_special_tokens][:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"its tokenizer is not that of model\.hf: set rewards\.model\.input=chat"):
        reader_of(str(reward_model), "tokens", tokenizer)
    config = Config()
    config.model.hf, config.model.max_length, config.rewards.model.path = str(policy), 64, str(reward_model)
    with pytest.raises(UserError, match=r"its tokenizer is not that of model\.hf"):
        check_reward_model(config)
    config.rewards.model.input = "chat"
    check_reward_model(config)
    special = tokenizer.all_special_tokens[0]
    check_texts([Prompt("a", (), "plain text", "", "t")], tokenizer)
    with pytest.raises(UserError, match="the prompt b is a chat, or holds special tokens"):
        check_texts([Prompt("b", (), f"{special} text", "", "t")], tokenizer)


def test_what_is_no_reward_model_is_refused(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base")
    config = Config()
    config.model.hf, config.model.max_length = str(base), 256

    def error_of(folder: Path) -> str:
        config.rewards.model.path = str(folder)
        with pytest.raises(UserError, match=r"^rewards\.model\.path: ") as failure:
            check_reward_model(config)
        return str(failure.value)

    assert "is not a checkpoint for sequence classification" in error_of(base)
    assert "score.weight has 2 labels, a reward model has one" in error_of(
        save_reward_model(tmp_path / "two", base, num_labels=2)
    )
    good = save_reward_model(tmp_path / "good", base)
    config.rewards.model.path = str(good)
    check_reward_model(config)
    config.model.max_length = 257
    assert "model.max_length 257 is more than the model's 256 positions" in error_of(good)
    config.model.max_length, config.parallel.tp = 256, 3
    assert "not divisible by tp 3" in error_of(good)
    config.parallel.tp = 1
    tensors = load_file(good / "model.safetensors")
    save_file(tensors | {"score.2.weight": torch.zeros(1, 64)}, good / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"unexpected: score\.2\.weight"):
        reward_model_tensors(good, Architecture.from_hf(good))
    (good / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert "model_type 'bert' is not supported; supported: qwen2, qwen3, qwen3_moe, llama" in error_of(good)
    assert "no such file" in error_of(tmp_path / "nowhere")
