"""Which part of a response is its program."""

import re
import textwrap
from dataclasses import dataclass

_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([^`]*)$")
_PYTHON = {"python", "python2", "python3", "py", "py3", "pypy", "pypy3", "cpython"}


@dataclass(frozen=True)
class Block:
    """A fenced block of Markdown."""

    language: str
    """The first word behind the fence, in lower case; "" if there is none."""
    text: str


def find_program(text: str) -> str | None:
    """The last block that is marked as Python, else the last without a language; None if there is neither.

    A block that is never closed is none: the response was not finished. Blocks may be indented, as in lists, and lines
    may end in CR LF. A fence of four or more characters holds shorter ones.
    """
    blocks = _blocks(text.replace("\r\n", "\n").replace("\r", "\n"))
    for wanted in (_PYTHON, {""}):
        if matching := [block.text for block in blocks if block.language in wanted]:
            return matching[-1]
    return None


def _blocks(text: str) -> list[Block]:
    blocks = []
    fence, language, lines = "", "", list[str]()
    for line in text.split("\n"):
        match = _FENCE.match(line)
        if not fence and match:
            fence, lines = match[1], []
            words = re.findall(r"[\w+#-]+", match[2])
            language = words[0].lower() if words else ""
        elif fence and match and match[1].startswith(fence) and not match[2].strip():
            blocks.append(Block(language, textwrap.dedent("\n".join(lines)) + "\n"))
            fence = ""
        elif fence:
            lines.append(line)
    # Some models close the last block on the line of its last statement.
    if fence and lines and lines[-1].rstrip().endswith(fence):
        lines[-1] = lines[-1].rstrip().removesuffix(fence)
        blocks.append(Block(language, textwrap.dedent("\n".join(lines)) + "\n"))
    return blocks
