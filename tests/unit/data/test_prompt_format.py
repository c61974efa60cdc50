"""What the model reads of a prompt: template, system prompt, chat template, and thinking that a template opens."""

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from megatron_vcppo.data.mixture import Mixture, join_prompts, training_sources
from megatron_vcppo.data.prompt_format import PromptFormat, after_opening, render_prompt
from megatron_vcppo.data.prompts import PromptStream, load_prompts
from megatron_vcppo.data.sft_dataset import SftDataset, load_sft_dataset
from megatron_vcppo.errors import UserError
from megatron_vcppo.records import Prompt
from megatron_vcppo.tasks.word_tokenizer import build_tokenizer

CHAT = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} ; {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% if thinking | default(true) %}<think>\n{% endif %}{% endif %}"
)
"""Opens the thinking of a response, as DeepSeek-R1's does, unless it is told not to."""
R1 = CHAT.replace("m.content", "(m.content.split('</think>')[-1] if m.role == 'assistant' else m.content)")
"""Drops the thinking of turns that are past, too."""


def tokenizer_with(template: str | None) -> PreTrainedTokenizerBase:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def text_of(how: PromptFormat, prompt: object = "3 ?", template: str | None = CHAT) -> str:
    return render_prompt(tokenizer_with(template), prompt, "prompt", how).text


def test_text_is_a_users_message_where_the_tokenizer_has_a_chat_template() -> None:
    assert text_of(PromptFormat()) == "user : 3 ? ; assistant : <think>\n"
    assert text_of(PromptFormat(apply_chat_template=False)) == text_of(PromptFormat(), template=None) == "3 ?"
    assert text_of(PromptFormat(chat_template_kwargs={"thinking": False})) == "user : 3 ? ; assistant : "


def test_template_and_system_prompt() -> None:
    how = PromptFormat(template="Solve {x} : {prompt} !", system="be brief")
    filled = "system : be brief ; user : Solve {x} : {3} ? ! ; assistant : <think>\n"
    assert text_of(how, "{3} ?") == filled
    turns = [("user", "1"), ("assistant", "2"), ("user", "3")]
    chat = [{"role": role, "content": content} for role, content in turns]
    assert "system : be brief ; user : 1 ; assistant : 2 ; user : Solve {x} : 3 ! ;" in text_of(how, chat)
    assert "be brief" not in text_of(how, [{"role": "system", "content": "mine"}, *chat])
    assert text_of(PromptFormat(template="Q {prompt} A"), template=None) == "Q 3 ? A"
    with pytest.raises(UserError, match=r"prompts\.system needs chats"):
        text_of(PromptFormat(system="x"), template=None)


def test_the_tasks_prompts_are_the_same_with_and_without_their_chat_template(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "3 #1 +4 ?", "answer": "7", "task": "running_sum", "response": "= 7"}))
    formats = [PromptFormat(apply_chat_template=applied) for applied in (True, False)]
    found = [load_prompts(str(path), build_tokenizer(), 50, how=how)[0] for how in formats]
    assert found[0] == found[1] and found[0][0].text == "3 #1 +4 ?"
    examples = [load_sft_dataset(str(path), build_tokenizer(), 50, how=how)[0][0] for how in formats]
    assert examples[0] == examples[1]


@pytest.mark.parametrize(
    ("prompt", "response", "left"),
    [
        ("a <think>\n", "<think>\nx </think> y", "x </think> y"),
        ("a <think>", "<think>\nx </think> y", "\nx </think> y"),
        ("a <think>\n", "x </think> y", "x </think> y"),
        ("a", "<think>\nx", "<think>\nx"),
    ],
)
def test_a_response_does_not_open_what_the_prompt_has_opened(prompt: str, response: str, left: str) -> None:
    assert after_opening(prompt, response) == left


@pytest.mark.parametrize("template", [CHAT, R1])
def test_examples_start_after_the_thinking_that_a_template_opens(tmp_path: Path, template: str) -> None:
    tokenizer = tokenizer_with(template)
    response = "<think>\n#1 </think> = 7"
    chat = [{"role": "user", "content": "3 ?"}, {"role": "assistant", "content": response}]
    path = tmp_path / "s.jsonl"
    path.write_text(json.dumps({"messages": chat}) + "\n" + json.dumps({"prompt": "3 ?", "response": response}))
    dataset, _ = load_sft_dataset(str(path), tokenizer, 50)
    for example in (dataset[0], dataset[1]):
        words = tokenizer.convert_ids_to_tokens(list(example.token_ids))
        loss = [word for word, on in zip(words, example.fields["loss_mask"], strict=True) if on]
        assert words.count("<think>") == 1 and loss == ["#1", "</think>", "=", "7", "<eos>"]


def test_weights_say_how_often_a_sample_comes() -> None:
    assert training_sources("a", {"b": 2.0}) == {"a": 1.0, "b": 2.0} and training_sources("a", {"a": 0.5}) == {"a": 0.5}
    first = Mixture([(3, 1.0), (2, 2.0)], seed=1)
    assert first.num_samples == 7
    assert [first.at(0, place) for place in range(7)] == [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0), (3, 1), (4, 1)]


def test_a_fractional_weight_draws_another_part_in_each_epoch() -> None:
    def epochs(seed: int) -> list[list[tuple[int, int]]]:
        mixture = Mixture([(10, 1.0), (100, 1.25)], seed)
        assert mixture.num_samples == 135
        return [[mixture.at(epoch, place) for place in range(135)] for epoch in (0, 1, 2, 0)]

    drawn = epochs(seed=1)
    parts = [{index for index, copy in epoch if copy} for epoch in drawn]
    assert all(len(part) == 25 and min(part) >= 10 for part in parts)
    assert parts[0] != parts[1] != parts[2] and drawn[3] == drawn[0]
    assert drawn == epochs(seed=1) and drawn != epochs(seed=2)
    assert all(sorted(index for index, copy in epoch if not copy) == list(range(110)) for epoch in drawn)


def test_mixed_prompts_come_as_often_as_their_weights_say_across_resumes() -> None:
    one, other = ([Prompt(f"p:{i}", (i,), text, "", "math") for i in range(4)] for text in "ab")
    prompts = join_prompts([one, other])
    assert [prompt.prompt_id for prompt in prompts[3:6]] == ["p:3", "p:0~1", "p:1~1"]
    assert join_prompts([one]) == one

    def stream() -> PromptStream:
        return PromptStream(prompts, 3, Mixture([(4, 2.0), (4, 0.5)], 3))

    whole, count = stream(), 10 * 4
    got = whole.next(count)
    ids = [prompt.prompt_id for prompt in got]
    assert len(set(ids)) == count and whole.epoch == 4
    assert sum(prompt.text == "a" for prompt in got) == 8 * 4
    assert sum(id.startswith("p:1+1@") for id in ids) == 4
    assert len({id.split("@")[0] for id in ids if "~" in id}) > 2, "not the same half in every epoch"
    resumed = stream()
    state = stream()
    state.next(17)
    resumed.load_state_dict(json.loads(json.dumps(state.state_dict())))
    assert resumed.next(count - 17) == got[17:]


def test_joined_examples(tmp_path: Path) -> None:
    datasets = []
    for name, digits in (("a", "123"), ("b", "45")):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"prompt": "?", "response": digit}) + "\n" for digit in digits))
        datasets.append(load_sft_dataset(str(path), build_tokenizer(), 50)[0])
    SftDataset.joined(datasets).save(tmp_path / "saved")
    joined = SftDataset.load(tmp_path / "saved")
    assert [joined[i] for i in range(5)] == [dataset[i] for dataset in datasets for i in range(len(dataset))]
    assert joined.sizes == [3, 2] and len(joined) == 5
