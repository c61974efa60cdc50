"""The words of the synthetic tasks, and the word-level tokenizer over them in Hugging Face format."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
THINK, END_THINK, ANSWER, CHECK, ASK = "<think>", "</think>", "=", "chk", "?"
MAX_STEPS = 64

DIGITS = tuple(str(i) for i in range(10))
INDICES = tuple(f"#{i}" for i in range(1, MAX_STEPS + 1))
SUM_OPS = tuple(f"{sign}{i}" for sign in "+-" for i in range(10))
LIST_OPS = ("reverse", "rotate", "swap", "sort", "raise", "lower")
SEARCH_OPS = ("*2", "*3", "*4", "*7", "*9")
SEARCH_WORDS = ("reach", "with", "within", "back")

SPECIALS = (PAD, BOS, EOS, UNK)
WORDS = (
    *SPECIALS,
    *(ASK, THINK, END_THINK, ANSWER, CHECK),
    *INDICES,
    *DIGITS,
    *SUM_OPS,
    *LIST_OPS,
    *SEARCH_OPS,
    *SEARCH_WORDS,
)

# A user turn is the prompt and an assistant turn the response, so that a chat of one turn gives the very tokens of
# prompt + response.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] + ' ' + eos_token }}"
    "{% else %}{{ ' ' + message['content'] }}{% endif %}{% endfor %}"
)


def build_tokenizer() -> "PreTrainedTokenizerFast":
    """One token per blank-separated word; BOS is put before a text, and decoding joins words with single blanks.

    Only <pad>, <bos>, <eos> and <unk> are special: the thinking tags stay in decoded text, where verifiers look.
    """
    # Imported here: verifier processes need the words only, and transformers takes seconds to import.
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

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
