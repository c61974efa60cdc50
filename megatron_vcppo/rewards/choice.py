r"""Multiple choice: the one letter that the response settles on, or the text of the option that the prompt lists."""

import re

from megatron_vcppo.records import Prompt
from megatron_vcppo.rewards.math_answer import answers_equal
from megatron_vcppo.rewards.notation import tidy
from megatron_vcppo.rewards.verifier import CORRECT, NO_ANSWER, Verdict, after_thinking, final_answer, wrong

_OPTION = re.compile(
    r"(?m)^[ \t>*\-]{0,8}(?:\(([A-Za-z])\)|\[([A-Za-z])\]|([A-Za-z])[).:、])[* \t]{0,8}(\S[^\n]{0,2000}?)[ \t]*$"
)
_LEADING = re.compile(
    r"(?:(?:the\s+)?(?:correct\s+)?(?:option|choice|answer|letter)s?\s*(?:is|are|:)?\s*)", re.IGNORECASE
)
_LETTER = re.compile(r"\(\s*([A-Za-z])\s*\)|\[\s*([A-Za-z])\s*\]|([A-Za-z])(?![A-Za-z'’])")
_NEXT = re.compile(r"\s*(?:[,;/&+]|and\b|or\b|,\s*and\b|,\s*or\b|\s)\s*", re.IGNORECASE)
_BEHIND = re.compile(
    r"\s*(?:[).:\]]\s*.*|[-–—,]\s.*|(?:because|since|as|is|which|with|for)\b.*|\(.*|)", re.DOTALL | re.IGNORECASE
)
_STATED = re.compile(
    r"\b(?i:answer|option|choice)\b[^.\n]{0,40}?\bis\b\W{0,8}(?:(?i:option|choice|letter)\W{0,3})?"
    r"([A-Z](?![A-Za-z'])[^\n]{0,40})"
    r"|\b(?i:option|choice)\W{0,4}([A-Z])\W{0,4}is\b[^.\n]{0,20}\b(?:correct|right|the answer)"
    r"|\b(?i:choose|select|pick|go with)\W{0,4}(?i:option|choice|letter)?\W{0,4}([A-Z])(?![A-Za-z'])",
)
_DENIED = re.compile(r"\bnot\b|n't\b", re.IGNORECASE)


def verify_choice(prompt: Prompt, response_text: str) -> Verdict:
    r"""Right if the response gives the prompt's letter and no other.

    Read from ``\boxed{B}`` or ``Answer: (B) …``, whatever encloses the letter, or from the text of an option that the
    prompt lists; without those from the last "the answer is B". More than one letter is wrong. Raises ValueError if
    the prompt's answer names no option.
    """
    expected = read_letters(prompt.answer, listed_options(prompt.text))
    if not expected:
        raise ValueError(
            f"{prompt.prompt_id}: the answer of a multiple-choice problem must be a letter or an option's text"
        )
    letters = chosen_letters(prompt, response_text)
    if not letters:
        return NO_ANSWER
    return CORRECT if letters == expected else wrong(letters)


def chosen_letters(prompt: Prompt, response_text: str) -> str:
    """The letters that a response settles on, in alphabetic order; "" for none."""
    options = listed_options(prompt.text)
    given = final_answer(response_text)
    letters = read_letters(given, options) if given else ""
    return letters or _stated_letters(after_thinking(response_text), options)


def listed_options(text: str) -> dict[str, str]:
    """letter → option of the last list A, B, C, … in a prompt; empty if it lists none."""
    options: dict[str, str] = {}
    for match in _OPTION.finditer(text):
        letter = (match[1] or match[2] or match[3]).upper()
        if letter == "A":
            options = {}
        if letter == chr(ord("A") + len(options)):
            options[letter] = match[4]
    return options if len(options) > 1 else {}


def read_letters(answer: str, options: dict[str, str]) -> str:
    r"""The letters that an answer names: "B" for ``\textbf{(B)}\ 5``, "AC" for "A and C", "" for none.

    options: as the prompt lists them; their text stands for their letter, if it is that of one option only.
    """
    text = tidy(answer)
    by_text = [letter for letter, option in options.items() if _same_text(text, tidy(option))]
    if len(by_text) == 1:
        return by_text[0]
    text = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text).replace("*", "").replace("{", " ").replace("}", " ").strip()
    text = _LEADING.sub("", text, count=1).strip() if _LEADING.match(text) else text
    letters, place = [], 0
    while match := _LETTER.match(text, place):
        letters.append((match[1] or match[2] or match[3]).upper())
        place = match.end()
        separator = _NEXT.match(text, place)
        if not separator or not _LETTER.match(text, separator.end()) or _is_article(text, separator.end()):
            break
        place = separator.end()
    if not letters:
        return _run(text)
    behind = text[place:]
    if text[place - 1] not in ")]" and not _BEHIND.fullmatch(behind) and not _repeats_option(letters, behind, options):
        return ""
    return "".join(sorted(set(letters)))


def _stated_letters(text: str, options: dict[str, str]) -> str:
    for match in reversed(list(_STATED.finditer(text))):
        if not _DENIED.search(match[0]):
            found = next(group for group in match.groups() if group)
            return read_letters(re.split(r"[.!?\n]", found)[0], options)
    return ""


def _run(text: str) -> str:
    """Letters written together: "AC" names two; words name none."""
    return "".join(sorted(text)) if re.fullmatch(r"(?!.*(.).*\1)[A-F]{2,6}", text) and text not in ("BE", "BED") else ""


def _is_article(text: str, place: int) -> bool:
    """Whether "a" or "I" at this place begins a word's phrase, not a second letter."""
    return bool(re.match(r"(?:a|I)\s+[a-z]", text[place:]))


def _repeats_option(letters: list[str], behind: str, options: dict[str, str]) -> bool:
    """ "B Paris": the letter and then its option's text."""
    return len(letters) == 1 and letters[0] in options and _same_text(behind.strip(), tidy(options[letters[0]]))


def _same_text(left: str, right: str) -> bool:
    return left.lower() == right.lower() or answers_equal(left, right)
