"""The word-level tokenizer of the synthetic tasks, in Hugging Face format."""

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from megatron_vcppo.tasks.vocabulary import BOS, EOS, PAD, UNK, WORDS

# A user turn is the prompt and an assistant turn the response, so that a chat of one turn gives the very tokens of
# prompt + response.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] + ' ' + eos_token }}"
    "{% else %}{{ ' ' + message['content'] }}{% endif %}{% endfor %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per blank-separated word; BOS is put before a text, and decoding joins words with single blanks.

    Only <pad>, <bos>, <eos> and <unk> are special: the thinking tags stay in decoded text, where verifiers look.
    """
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=None, special_tokens=[(BOS, WORDS.index(BOS))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS, unk_token=UNK, padding_side="left"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
