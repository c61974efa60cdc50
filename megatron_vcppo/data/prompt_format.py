"""How a prompt of the data becomes the text that the model reads: template, system prompt, chat template."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_vcppo.config import PromptsConfig
from megatron_vcppo.data.bad_samples import BadSample
from megatron_vcppo.data.tokenizer import Messages, check_messages
from megatron_vcppo.errors import UserError

THINK, END_THINK = "<think>", "</think>"
PLACE = "{prompt}"


@dataclass(frozen=True)
class PromptFormat:
    """The keys of ``prompts`` that change a prompt's text; the same for SFT, rollouts and evaluation."""

    template: str = PLACE
    system: str | None = None
    apply_chat_template: bool = True
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, prompts: PromptsConfig) -> "PromptFormat":
        """As the configuration says."""
        return cls(prompts.template, prompts.system, prompts.apply_chat_template, prompts.chat_template_kwargs)

    def fill(self, text: str) -> str:
        """The template with the text in its place; braces of either are left alone."""
        return self.template.replace(PLACE, text)

    def chat(self, messages: Messages) -> Messages:
        """The chat with the system prompt, if it has none, and the template around its last user message."""
        users = [index for index, message in enumerate(messages) if message["role"] == "user"]
        last = users[-1] if users else None
        filled = [
            {**message, "content": self.fill(message["content"])} if index == last else message
            for index, message in enumerate(messages)
        ]
        if self.system is None or filled[0]["role"] == "system":
            return filled
        return [{"role": "system", "content": self.system}, *filled]


DEFAULT_FORMAT = PromptFormat()


@dataclass(frozen=True)
class RenderedPrompt:
    """A prompt as it is shown, and as the model reads it."""

    shown: str
    """What verifiers and reports see: the text of the data, or the rendered chat."""
    text: str
    special: bool
    """Whether the tokenizer's special tokens (BOS) still have to be added."""


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Any, key: str, how: PromptFormat = DEFAULT_FORMAT
) -> RenderedPrompt:
    """A prompt of the data, text or a list of messages, as the model reads it.

    Chats go through the chat template, which writes its own BOS; text does, too, as a user's message, if the tokenizer
    has a template and ``how`` wants it. Raises BadSample that names ``key`` if the prompt is neither; UserError if
    there is no chat template for a chat or a system prompt.
    """
    if isinstance(prompt, list):
        text = render_chat(tokenizer, how.chat(check_messages(prompt, key)), for_response=True, how=how)
        return RenderedPrompt(text, text, special=False)
    if not isinstance(prompt, str):
        raise BadSample("wrong type", f"{key!r} is a {type(prompt).__name__}, neither text nor messages")
    if how.apply_chat_template and tokenizer.chat_template:
        chat = how.chat([{"role": "user", "content": prompt}])
        return RenderedPrompt(prompt, render_chat(tokenizer, chat, for_response=True, how=how), special=False)
    if how.system is not None:
        raise UserError(
            "prompts.system needs chats: a tokenizer with a chat_template and prompts.apply_chat_template true; "
            "else put its text into prompts.template"
        )
    return RenderedPrompt(prompt, how.fill(prompt), special=True)


def render_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, for_response: bool, how: PromptFormat = DEFAULT_FORMAT
) -> str:
    """The chat as text. for_response: followed by what opens an assistant turn.

    Raises UserError if the tokenizer has no chat template, BadSample if the template refuses the messages.
    """
    if not tokenizer.chat_template:
        raise UserError("the data holds chat messages but the tokenizer has no chat_template; use a tokenizer with one")
    try:
        rendered = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=for_response, **how.chat_template_kwargs
        )
    except Exception as error:  # templates raise what they like (jinja2, KeyError, TypeError)
        raise BadSample(
            "bad chat", f"the chat template refuses it: {type(error).__name__}: {' '.join(str(error).split())[:120]}"
        ) from error
    return str(rendered)


def opens_thinking(prompt_text: str) -> bool:
    """Whether a prompt ends with an open ``<think>``, as some chat templates write it: the response starts after it."""
    return prompt_text.rstrip().endswith(THINK)


def after_opening(prompt_text: str, response: str) -> str:
    """The response without a ``<think>`` of its own, where the prompt has opened it already."""
    if not opens_thinking(prompt_text) or not response.lstrip().startswith(THINK):
        return response
    rest = response.lstrip().removeprefix(THINK)
    # The line break behind the tag is the template's if it wrote one.
    return rest.removeprefix("\n") if prompt_text.endswith("\n") else rest
