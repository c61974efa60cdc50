r"""Arguments of TeX commands without braces: ``\frac\pi2`` and ``x^\frac12`` as TeX reads them."""

import re

_NUM_ARGUMENTS = {r"\frac": 2, r"\binom": 2, r"\sqrt": 1}
_TAKES_GROUP = re.compile(r"\\(?:text|math|over|under|bar|vec|hat|operatorname|boldsymbol)[a-z]*")
_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|.", re.DOTALL)
_DEEPEST = 40


def brace_arguments(text: str) -> str:
    r"""The text with braces around every argument of fractions, binomials and roots, and of such a one as exponent.

    ``(3, \frac\pi2)`` becomes ``(3, \frac{\pi}{2})``. An argument is a group, a letter, a digit or a command with its
    arguments. Other exponents stay as they are: people write 2^10 for 2^{10}. What lacks an argument, or stands more
    than 40 commands deep, stays as it is.
    """
    return _braced(_TOKEN.findall(text), 0)


def _braced(tokens: list[str], depth: int) -> str:
    if depth > _DEEPEST:
        return "".join(tokens)
    out: list[str] = []
    place = 0
    while place < len(tokens):
        arguments = _arguments(tokens, place)
        if arguments:
            start, _ = arguments[0]
            written = "".join(tokens[place:start]).rstrip()
            for start, end in arguments:
                is_group = tokens[start] == "{"
                written += f"{{{_braced(tokens[start + is_group : end - is_group], depth + 1)}}}"
            out.append(f"{{{written}}}" if out and out[-1] in "^_" else written)
            place = arguments[-1][1]
        else:
            out.append(tokens[place])
            place += 1
    return "".join(out)


def _arguments(tokens: list[str], place: int, depth: int = 0) -> list[tuple[int, int]]:
    """Where the arguments of the command at ``place`` start and end; none if it has none, or one is missing."""
    count = _NUM_ARGUMENTS.get(tokens[place], 0)
    if not count or depth > _DEEPEST:
        return []
    name, place = tokens[place], place + 1
    if name == r"\sqrt" and place < len(tokens) and tokens[place] == "[":
        if "]" not in tokens[place:]:
            return []
        place = tokens.index("]", place) + 1
    found = []
    for _ in range(count):
        while place < len(tokens) and tokens[place].isspace():
            place += 1
        end = _end_of_argument(tokens, place, depth) if place < len(tokens) else 0
        if not end:
            return []
        found.append((place, end))
        place = end
    return found


def _end_of_argument(tokens: list[str], place: int, depth: int) -> int:
    """Where the argument that starts at ``place`` ends; 0 if none starts there."""
    token = tokens[place]
    if token in _NUM_ARGUMENTS:
        arguments = _arguments(tokens, place, depth + 1)
        return arguments[-1][1] if arguments else 0
    if token == "{":
        return _end_of_group(tokens, place)
    if _TAKES_GROUP.fullmatch(token) and tokens[place + 1 : place + 2] == ["{"]:
        return _end_of_group(tokens, place + 1)
    return place + 1 if token.isalnum() or re.fullmatch(r"\\[A-Za-z]+", token) else 0


def _end_of_group(tokens: list[str], place: int) -> int:
    """Behind the partner of the brace at ``place``; 0 if it has none."""
    depth = 0
    for end in range(place, len(tokens)):
        depth += {"{": 1, "}": -1}.get(tokens[end], 0)
        if not depth:
            return end + 1
    return 0
