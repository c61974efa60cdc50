"""Where tokenizers are loaded and prompts become token ids: the one place, so that training and rollouts agree."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from megatron_vcppo.data.bad_samples import BadSample
from megatron_vcppo.data.vocabulary import check_ids
from megatron_vcppo.errors import UserError

Messages = list[dict[str, Any]]

CHARACTERS_PER_TOKEN = 256
"""More than the longest tokens of any vocabulary have (128 blanks, in Qwen's)."""
LONGEST_TEXT = 32 << 20
"""Characters of a sample, whatever the limit in tokens is."""
_PROBE = " The answer's 1234.5 – it’ll do:\n\n\tdef f(x_1): return {'a': [x**2]}  # naïve, 数学 №7 +3 #4 </think>"


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer saved in a Hugging Face checkpoint folder; never looks at the network.

    Raises UserError if the folder or its tokenizer is missing or broken, if it names no end-of-sequence token, if
    transformers does not follow the folder's tokenizer.json, or if tokens have no row in the model's embedding.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"model.hf: {path} is not a folder; it must be a Hugging Face checkpoint with a tokenizer")
    if not any((path / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise UserError(f"{path} holds no tokenizer (tokenizer.json); copy it from the base model")
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # whatever transformers raises for a broken file, the user can only fix the folder
        raise UserError(f"cannot load the tokenizer of {path}: {' '.join(str(error).split())[:300]}") from error
    finally:
        transformers_logging.set_verbosity(level)
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {path} has no eos_token; set it in tokenizer_config.json")
    _check_against_file(tokenizer, path)
    check_ids(path, tokenizer.get_vocab())
    return tokenizer


def _check_against_file(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """For some model types (qwen2) transformers rebuilds the tokenizer from its vocabulary by that type's own rules.

    With another tokenizer in the folder, text would be split wrongly, and nothing would say so.
    """
    if not (path / "tokenizer.json").exists():
        return
    stored = Tokenizer.from_file(str(path / "tokenizer.json"))
    stored.no_padding()
    stored.no_truncation()
    words = sorted(stored.get_vocab(with_added_tokens=False))
    probe = " ".join(words[:: len(words) // 200 + 1]) + _PROBE
    if stored.encode(probe, add_special_tokens=False).ids != encode_texts(tokenizer, [probe], special=False)[0]:
        raise UserError(
            f"{path}: transformers reads its tokenizer as {type(tokenizer).__name__}, which splits text differently "
            "from its tokenizer.json; the model_type in config.json must be one that the tokenizer was made for"
        )


def check_size(num_characters: int, max_length: int) -> None:
    """Raises BadSample for a text that is far longer than ``max_length`` tokens can be, before it is tokenized.

    A tokenizer takes gigabytes and minutes for a text of 100 MB, only to find that it is too long.
    """
    most = min(max_length * CHARACTERS_PER_TOKEN, LONGEST_TEXT)
    if num_characters > most:
        raise BadSample("too long", f"{num_characters:,} characters; {most:,} are the most that is tokenized")


def splits_alike(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers have the same tokens with the same ids, and split a probe of all kinds of text alike."""
    if tokenizer.get_vocab() != other.get_vocab():
        return False
    words = sorted(tokenizer.get_vocab())
    probe = " ".join(words[:: len(words) // 200 + 1]) + _PROBE
    return encode_texts(tokenizer, [probe], special=False) == encode_texts(other, [probe], special=False)


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str], special: bool) -> list[list[int]]:
    """Token ids of each text; special: with the tokens that the tokenizer puts around a text, such as BOS."""
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]


def check_messages(messages: Any, key: str) -> Messages:
    """``messages`` as a chat: a list of {role, content}, both text. Raises BadSample that names ``key``.

    Content may be a list of parts, which must be text; {from, value} with human and gpt is read as well.
    """
    chat = [_message(message) for message in messages] if isinstance(messages, list) else []
    if not chat or None in chat:
        raise BadSample("wrong type", f"{key!r} is not a list of messages with text under role and content")
    return [message for message in chat if message is not None]


_SENDERS = {"human": "user", "gpt": "assistant"}


def _message(message: Any) -> dict[str, Any] | None:
    if not isinstance(message, dict):
        return None
    role, content = message.get("role"), message.get("content")
    if role is None and "from" in message:
        role, content = _SENDERS.get(str(message["from"]), message["from"]), message.get("value")
    if isinstance(content, list):
        content = _joined_parts(content)
    is_text = isinstance(role, str) and isinstance(content, str)
    return {**message, "role": role, "content": content} if is_text else None


def _joined_parts(parts: list[Any]) -> str | None:
    """The text of a message's parts; None if one of them is no text."""
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    whole = len(texts) == len(parts) and all(isinstance(text, str) for text in texts)
    return "".join(map(str, texts)) if whole else None
