"""What the model reads of a prompt: template, system prompt, chat template, and thinking that a template opens."""

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from megatron_vcppo.data.mixture import mix_prompts, repeated, training_sources
from megatron_vcppo.data.prompt_format import PromptFormat, after_opening, render_prompt
from megatron_vcppo.data.prompts import load_prompts
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
    assert repeated(3, 1) == [0, 1, 2] and repeated(3, 2) == [0, 1, 2, 0, 1, 2]
    part = repeated(100, 1.25)
    assert part[:100] == list(range(100)) and len(set(part[100:])) == 25 and part == repeated(100, 1.25)
    assert part[100:] != list(range(25))


def test_mixed_prompts_keep_distinct_ids() -> None:
    first, other = ([Prompt(f"p:{i}", (i,), text, "", "math") for i in range(2)] for text in "ab")
    mixed = mix_prompts([(first, 1), (other, 2)])
    assert [prompt.text for prompt in mixed] == ["a", "a", "b", "b", "b", "b"]
    assert len({prompt.prompt_id for prompt in mixed}) == 6
    assert mix_prompts([(first, 1)]) == first


def test_mixed_examples(tmp_path: Path) -> None:
    datasets = []
    for name, digits in (("a", "123"), ("b", "45")):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"prompt": "?", "response": digit}) + "\n" for digit in digits))
        datasets.append(load_sft_dataset(str(path), build_tokenizer(), 50)[0])
    mixed = SftDataset.mixed([(datasets[0], 1), (datasets[1], 2)])
    alone = [dataset[i] for dataset in datasets for i in range(len(dataset))]
    assert [mixed[i] for i in range(len(mixed))] == [*alone, *alone[3:]]
