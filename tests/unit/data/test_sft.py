"""SFT examples: what carries loss, what becomes of bad data, in which order samples come."""

import json
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import Sequence
from transformers import PreTrainedTokenizerBase

from megatron_vcppo.data.epoch_order import EpochOrder
from megatron_vcppo.data.prompts import load_prompts
from megatron_vcppo.data.sft_dataset import SftDataset, load_sft_dataset
from megatron_vcppo.data.tokenizer import encode_texts, load_tokenizer
from megatron_vcppo.errors import UserError
from megatron_vcppo.tasks.word_tokenizer import build_tokenizer

PROMPT, RESPONSE = "3 #1 +4 ?", "<think> #1 +4 7 </think> = 7"
CHATML = (
    "{% for m in messages %}<think>{{ m.role[0] | replace('u', '1') | replace('a', '2') | replace('s', '3') }} "
    "{{ m.content }} <pad>\n{% endfor %}{% if add_generation_prompt %}<think>2 {% endif %}"
)
"""Like ChatML: a turn opens with a tag and a role and ends with a special token and a newline."""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer()


def write_lines(path: Path, lines: list[dict | str]) -> str:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return str(path)


def example(tokenizer: PreTrainedTokenizerBase, dataset: SftDataset, index: int) -> tuple[str, str]:
    """The words of an example, and those among them that carry loss."""
    sequence = dataset[index]
    words = tokenizer.convert_ids_to_tokens(list(sequence.token_ids))
    return " ".join(words), " ".join(w for w, on in zip(words, sequence.fields["loss_mask"], strict=True) if on)


def test_loss_is_on_the_response_and_its_eos(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    source = write_lines(tmp_path / "t.jsonl", [{"prompt": PROMPT, "response": RESPONSE}])
    dataset, report = load_sft_dataset(source, tokenizer, 100)
    assert example(tokenizer, dataset, 0) == (f"<bos> {PROMPT} {RESPONSE} <eos>", f"{RESPONSE} <eos>")
    assert str(report) == f"{source}: 1 samples, 1 used"
    assert dataset.lengths.tolist() == [13] and dataset.num_loss_tokens == 8


def test_a_chat_of_one_turn_is_prompt_and_response(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    user, assistant = {"role": "user", "content": PROMPT}, {"role": "assistant", "content": RESPONSE}
    source = write_lines(
        tmp_path / "t.jsonl",
        [
            {"messages": [user, assistant]},
            {"prompt": [user], "response": RESPONSE},
            {"messages": [user, assistant, user]},
            {"prompt": PROMPT, "response": RESPONSE},
        ],
    )
    dataset, _ = load_sft_dataset(source, tokenizer, 100)
    assert len({(dataset[i].token_ids, dataset[i].fields["loss_mask"]) for i in range(4)}) == 1


def test_every_assistant_turn_has_loss_and_nothing_else(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHATML
    turns = [("system", "0"), ("user", "5"), ("assistant", "6 6"), ("user", "7"), ("assistant", "8")]
    source = write_lines(tmp_path / "t.jsonl", [{"messages": [{"role": r, "content": c} for r, c in turns]}])
    dataset, _ = load_sft_dataset(source, tokenizer, 100)
    # "<think>3" is one unknown word here; what matters is where the loss lies: content, end token, EOS at the end.
    words, loss = example(tokenizer, dataset, 0)
    assert loss == "6 6 <pad> 8 <pad> <eos>"
    assert words == "<unk> 0 <pad> <unk> 5 <pad> <unk> 6 6 <pad> <unk> 7 <pad> <unk> 8 <pad> <eos>"


def test_a_template_that_rewrites_earlier_turns_is_found(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content if loop.last else '0' }} {% endfor %}"
    chat = [
        {"role": r, "content": c} for r, c in (("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4"))
    ]
    source = write_lines(tmp_path / "t.jsonl", [{"messages": chat}])
    with pytest.raises(UserError, match="does not append message 1"):
        load_sft_dataset(source, tokenizer, 100)


BAD_LINES: list[dict | str] = [
    {"prompt": PROMPT, "response": RESPONSE},
    "{broken",
    {"prompt": PROMPT},
    {"prompt": 5, "response": RESPONSE},
    {"prompt": PROMPT, "response": "  "},
    "",
    {"prompt": PROMPT, "response": f"{RESPONSE} 1 1 1 1 1 1 1 1"},
    {"prompt": f"{PROMPT} 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1", "response": RESPONSE},
    "[1, 2]",
    {"messages": [{"role": "user", "content": "1"}]},
    {"messages": [{"role": "user"}]},
    {"prompt": PROMPT, "response": RESPONSE},
    '{"prompt": "3 #1", "response": "\\ud83d"}',
    "[" * 100_000,
]


@pytest.mark.parametrize(("on_bad_sample", "used", "truncated"), [("skip", 2, 0), ("truncate", 3, 1)])
def test_bad_samples_are_counted_and_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, on_bad_sample: str, used: int, truncated: int
) -> None:
    source = write_lines(tmp_path / "t.jsonl", BAD_LINES)
    dataset, report = load_sft_dataset(source, tokenizer, 16, on_bad_sample)
    assert len(dataset) == report.num_used == used and report.num_samples == 13
    assert report.num_truncated == truncated and sum(report.counts.values()) == 11
    assert report.problems == {
        "malformed": [2, 9, 13, 14],
        "missing key": [3],
        "wrong type": [4, 11],
        "empty response": [5, 10],
        "too long": [7, 8],
    }
    assert dataset.lengths.max() <= 16
    assert f"4 × malformed: {source}:2, {source}:9, {source}:13, {source}:14" in str(report)


def test_policy_error_lists_the_bad_samples(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    source = write_lines(tmp_path / "t.jsonl", BAD_LINES[:12])
    with pytest.raises(UserError) as caught:
        load_sft_dataset(source, tokenizer, 16)
    assert f"{source}: 9 bad samples" in str(caught.value)
    assert f"{source}:3: missing key: 'response'; it has prompt" in str(caught.value)
    many = write_lines(tmp_path / "many.jsonl", ["x"] * 1000)
    with pytest.raises(UserError, match="at least 10 bad samples"):
        load_sft_dataset(many, tokenizer, 16)


def test_sources_that_cannot_be_read(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    for source, message in [
        (str(tmp_path / "none.jsonl"), "no such file"),
        (str(tmp_path), "cannot read the data set"),
        (write_lines(tmp_path / "empty.jsonl", [""]), "holds no sample"),
        (write_lines(tmp_path / "t.txt", ["x"]), "expected a .jsonl"),
    ]:
        with pytest.raises(UserError, match=message):
            load_sft_dataset(source, tokenizer, 16, "skip")
    with pytest.raises(UserError, match="bad_samples: 'ignore'"):
        load_sft_dataset("x", tokenizer, 16, "ignore")
    with pytest.raises(UserError, match="no usable sample"):
        load_sft_dataset(write_lines(tmp_path / "bad.jsonl", ["x"]), tokenizer, 16, "skip")


def test_saved_data_sets_and_parquet_equal_jsonl(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"prompt": f"{i} #1 +4 ?", "response": RESPONSE} for i in range(10)]
    table = Dataset.from_list(rows)
    table.save_to_disk(str(tmp_path / "saved"))
    DatasetDict({"train": table}).save_to_disk(str(tmp_path / "splits"))
    table.to_parquet(str(tmp_path / "t.parquet"))
    sources = [write_lines(tmp_path / "t.jsonl", list(rows))]
    sources += [str(tmp_path / name) for name in ("saved", "splits", "t.parquet")]
    loaded = [load_sft_dataset(source, tokenizer, 100)[0] for source in sources]
    for other in loaded[1:]:
        assert [other[i] for i in range(10)] == [loaded[0][i] for i in range(10)]
    with pytest.raises(UserError, match="splits:test has no split 'test'; it has train"):
        load_sft_dataset(f"{tmp_path}/splits:test", tokenizer, 100)


def test_a_split_of_a_saved_data_set_is_named_behind_its_folder(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    tables = {
        split: Dataset.from_list([{"prompt": "3 #1", "response": "7"}] * count)
        for split, count in (("train", 2), ("held_out", 3))
    }
    DatasetDict(tables).save_to_disk(str(tmp_path / "splits"))
    for source, count in (("splits", 2), ("splits:train", 2), ("splits:held_out", 3)):
        assert len(load_sft_dataset(str(tmp_path / source), tokenizer, 100)[0]) == count
    with pytest.raises(UserError, match="splits:test has no split 'test'; it has train, held_out"):
        load_sft_dataset(str(tmp_path / "splits:test"), tokenizer, 100)


def test_progress_is_reported(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    source = write_lines(tmp_path / "t.jsonl", [{"prompt": PROMPT, "response": RESPONSE}] * 1200)
    seen: list[tuple[int, float]] = []
    load_sft_dataset(source, tokenizer, 100, on_progress=lambda count, fraction: seen.append((count, fraction)))
    assert [count for count, _ in seen] == [512, 1024, 1200] and seen[-1][1] == 1.0


def test_saved_examples_come_back_and_replace_older_ones(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows: list[dict | str] = [{"prompt": f"{i} #1 +4 ?", "response": RESPONSE} for i in range(5)]
    for count in (2, 5):
        dataset, _ = load_sft_dataset(write_lines(tmp_path / "t.jsonl", rows[:count]), tokenizer, 100)
        dataset.save(tmp_path / "saved")
        loaded = SftDataset.load(tmp_path / "saved")
        assert [loaded[i] for i in range(count)] == [dataset[i] for i in range(count)] and len(loaded) == count
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved", "t.jsonl"]


def test_tokenizer_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot load the tokenizer"):
        load_tokenizer(tmp_path)
    build_tokenizer().save_pretrained(tmp_path / "good")
    # For this model type transformers puts Qwen2's rules in the place of tokenizer.json.
    (tmp_path / "good" / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(UserError, match="reads its tokenizer as Qwen2Tokenizer, which splits text differently"):
        load_tokenizer(tmp_path / "good")
    (tmp_path / "good" / "config.json").write_text('{"model_type": "qwen3"}')
    assert load_tokenizer(tmp_path / "good")(PROMPT)["input_ids"] == build_tokenizer()(PROMPT)["input_ids"]


@given(st.integers(1, 30), st.lists(st.integers(1, 20), min_size=1, max_size=8), st.integers(0, 7))
@settings(max_examples=60, deadline=None)
def test_order_resumes_exactly_and_covers_each_epoch(num_samples: int, batches: list[int], cut: int) -> None:
    whole = EpochOrder(num_samples, seed=3)
    expected = [whole.next(size) for size in batches]
    first = EpochOrder(num_samples, seed=3)
    for size in batches[:cut]:
        first.next(size)
    second = EpochOrder(num_samples, seed=3)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [second.next(size) for size in batches[cut:]] == expected[cut:]
    stream = [pair for batch in expected for pair in batch]
    assert len(set(stream)) == len(stream)
    for epoch in range(len(stream) // num_samples):
        assert sorted(index for e, index in stream if e == epoch) == list(range(num_samples))


def test_order_depends_on_seed_and_refuses_other_data() -> None:
    orders = [tuple(EpochOrder(50, seed).next(50)) for seed in (0, 1)]
    assert orders[0] != orders[1] and orders[0] != tuple((0, i) for i in range(50))
    epochs = np.array(EpochOrder(50, 0).next(100))[:, 1].reshape(2, 50)
    assert (epochs[0] != epochs[1]).any()
    state = EpochOrder(50, 0).state_dict()
    with pytest.raises(UserError, match="num_samples 50, now it is 51"):
        EpochOrder(51, 0).load_state_dict(state)
    with pytest.raises(UserError, match="train: no samples"):
        EpochOrder(0, 0, "train")


@pytest.mark.parametrize("on_bad_sample", ["skip", "truncate"])
def test_a_huge_text_is_not_tokenized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_bad_sample: str) -> None:
    """Of 100 MB, a tokenizer makes 18 GB before anyone can see that the sample is too long."""
    tokenizer = build_tokenizer()
    huge = "1 " * 50_000
    rows: list[dict | str] = [
        {"prompt": PROMPT, "response": RESPONSE},
        {"prompt": PROMPT, "response": huge},
        {"prompt": huge, "response": RESPONSE},
        {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": huge}]},
    ]
    longest = 0

    def encode(own: PreTrainedTokenizerBase, texts: list[str], special: bool) -> list[list[int]]:
        nonlocal longest
        longest = max(longest, *map(len, texts), 0) if texts else longest
        return encode_texts(own, texts, special)

    for module in ("sft_dataset", "prompts"):
        monkeypatch.setattr(f"megatron_vcppo.data.{module}.encode_texts", encode)
    source = write_lines(tmp_path / "t.jsonl", rows)
    dataset, report = load_sft_dataset(source, tokenizer, 100, on_bad_sample)
    assert len(dataset) == 1 and report.problems == {"too long": [2, 3, 4]}
    problems: list[dict | str] = [{"prompt": text, "answer": "7", "task": "math"} for text in (PROMPT, huge)]
    prompts, report = load_prompts(write_lines(tmp_path / "p.jsonl", problems), tokenizer, 100, on_bad_sample)
    assert len(prompts) == 1 and report.problems == {"too long": [2]}
    assert 0 < longest < 1000


def test_a_response_that_leaves_no_token_to_learn_is_empty(tmp_path: Path) -> None:
    """The first token of a sequence is never predicted: without a BOS before it, a response of EOS alone is nothing."""
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.post_processor = Sequence([])  # adds no BOS, like Qwen's
    tokenizer.chat_template = None  # which would write one
    source = write_lines(tmp_path / "t.jsonl", [{"prompt": "", "response": "<eos>"}, {"prompt": "", "response": "7"}])
    dataset, report = load_sft_dataset(source, tokenizer, 100, "skip")
    assert report.problems == {"empty response": [1]} and len(dataset) == 1
    assert example(tokenizer, dataset, 0) == ("7 <eos>", "<eos>")


def test_escaped_pairs_are_text(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    source = write_lines(tmp_path / "t.jsonl", ['{"prompt": "3 \\ud83d\\ude00", "response": "7"}'])
    assert load_sft_dataset(source, tokenizer, 100)[1].num_used == 1
