"""Whether a model folder's chat template ends: it is a program, and may come from anyone.

It is rendered once in a process of its own with limits of time and memory, before anything starts. What else is wrong
with a template shows at the first prompt, as one line.
"""

import json
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_vcppo.errors import UserError
from megatron_vcppo.run.files import read_json, read_text

CPU_S, MEMORY_BYTES, DEADLINE_S = 3, 2 << 30, 60.0
"""Of the process; a template of a known model takes a millisecond. The deadline is for a machine that is overloaded."""
MESSAGES = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Four."}]
_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
"""A tag of `transformers` that jinja does not know; it changes nothing in the text."""
_RENDER = f"""
import json, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, ({CPU_S}, {CPU_S} + 1))
resource.setrlimit(resource.RLIMIT_AS, ({MEMORY_BYTES}, {MEMORY_BYTES}))
from jinja2.sandbox import ImmutableSandboxedEnvironment
given = json.load(sys.stdin)
jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
try:
    jinja.from_string(given["template"]).render(
        messages=given["messages"], add_generation_prompt=True, bos_token="", eos_token="")
except MemoryError:
    sys.exit(3)
except Exception:
    pass
"""


def check_chat_template(folder: Path) -> None:
    """UserError if a chat template of the folder takes time or memory without end; nothing where there is none."""
    for name, template in _templates(folder):
        given = json.dumps({"template": _GENERATION.sub("", template), "messages": MESSAGES})
        try:
            code = subprocess.run(
                [sys.executable, "-I", "-c", _RENDER],
                input=given.encode(errors="replace"),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=DEADLINE_S,
            ).returncode
        except subprocess.TimeoutExpired:
            code = -1
        if code < 0 or code == 3:
            what = f"{MEMORY_BYTES >> 30} GiB of memory are" if code == 3 else f"{CPU_S} s of processor time are"
            raise UserError(f"{folder / name}: the chat template does not end: {what} not enough for two messages")


def _templates(folder: Path) -> list[tuple[str, str]]:
    """(file, template) of the folder; what cannot be read counts as none: the tokenizer says what is wrong with it."""
    found: list[tuple[str, Any]] = []
    with suppress(OSError, ValueError):
        found.append(("chat_template.jinja", read_text(folder / "chat_template.jinja")))
    try:
        stored = read_json(folder / "tokenizer_config.json")["chat_template"]
    except (OSError, ValueError, KeyError, TypeError):
        stored = None
    named = stored if isinstance(stored, list) else [{"template": stored}]
    found += [("tokenizer_config.json", one.get("template")) for one in named if isinstance(one, dict)]
    return [(name, template) for name, template in found if isinstance(template, str)]
