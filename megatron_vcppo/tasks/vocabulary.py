"""The words of the synthetic tasks; the tokenizer over them is in word_tokenizer.py."""

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
