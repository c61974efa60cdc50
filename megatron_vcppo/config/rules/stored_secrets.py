"""No secrets in a configuration, which is stored where others can read it.

What is looked for is how secrets are written: a variable, option, field or header whose name says that it is one, with
a value; the forms of Authorization; a password in a URL; the prefixes of well-known tokens. A value that begins with
``$`` or a backtick is a reference, which is how a shell line should name a secret.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from megatron_vcppo.config.schema import Config

ENDINGS = ("KEY", "TOKEN", "SECRET", "PASSWORD", "PASSWD", "CREDENTIALS")
"""A name with a part that ends so is that of a secret, such as HF_TOKEN; TOKENIZERS_PARALLELISM has no such part."""
WORDS = ("PASS", "PAT", "AUTH")
"""The same for whole parts, such as GITHUB_PAT."""
PLACES = ("FILE", "PATH", "DIR", "SOCK", "STDIN")
"""With such a last part it is the name of where a secret is."""
VALUE = r"""["']?(?![$`"'\s<>|&;)]|$)"""
NAMED = re.compile(
    rf"(?<![\w.$/-])-*([A-Za-z_][\w.-]*)={VALUE}|--([a-z][\w-]*)\s+{VALUE}|([A-Za-z]+-[\w-]+):\s*{VALUE}"
)
"""``HF_TOKEN=x``, ``?token=x``, ``--api-key x``, ``X-Api-Key: x``."""
FORMS = {
    "the value of Authorization": re.compile(
        rf"Authorization:\s*(?:[A-Za-z]+\s+)?(?!\$|[A-Za-z]+\s+[$`]){VALUE}", re.IGNORECASE
    ),
    "a bearer token": re.compile(rf"\bBearer\s+{VALUE}"),
    "a password of Basic": re.compile(r"\bBasic\s+(?=\S*(?:\d|[a-z][A-Z]|=))[A-Za-z0-9+/]{6,}"),
    "the password in a URL": re.compile(r"://[^\s/@:]*:(?!\$)[^\s/@]+@"),
    "a token": re.compile(
        r"(?<![\w-])(?:hf_[A-Za-z0-9]{20,}|gh[opsu]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}"
        r"|sk-(?=[\w-]*\d)(?=[\w-]*[A-Z])[\w-]{20,})"
    ),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY"),
}


PROSE = ("prompts.system", "prompts.template")
"""What the model reads, where ``answer_key=42`` and "Bearer of news" are text."""


def secrets(config: Config) -> Iterator[str]:
    """No secret anywhere in it; one line per text that has one."""
    named = {f"cluster.environment.{name}": name for name in config.cluster.environment if is_secret(name)}
    found = {key: (key, name) for key, name in named.items()}
    for key, text in _texts(asdict(config), ""):
        if key in PROSE:
            continue
        names = (next(filter(None, groups)) for groups in NAMED.findall(text))
        if name := next(filter(is_secret, names), None):
            found.setdefault(key, (f"{key}: {name}", name))
        elif form := next((form for form, pattern in FORMS.items() if pattern.search(text)), None):
            found.setdefault(key, (f"{key}: {form}", "it"))
    for where, what in found.values():
        yield (
            f"{where} looks like a secret, and configurations are stored where others can read them: export {what} in "
            "the shell that submits; a shell line may name it as $NAME"
        )


def is_secret(name: str) -> bool:
    """True if the variable, option or field of this name holds a secret. Examples: HF_TOKEN, api-key, GITHUB_PAT."""
    parts = re.split(r"[_.-]", name.upper())
    return parts[-1] not in PLACES and any(part.endswith(ENDINGS) or part in WORDS for part in parts)


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """(dotted key, text) of everything that a user can write, names in mappings included."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield key, str(name)
            yield from _texts(item, f"{key}.{name}".removeprefix("."))
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _texts(item, f"{key}[{number}]")
