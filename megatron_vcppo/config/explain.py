"""Every key as text, for ``vcppo config --explain`` and docs/configuration.md."""

import json
import textwrap
from collections.abc import Iterator

from omegaconf import MISSING

from megatron_vcppo.config.keys import Key, all_keys, all_sections, nearest_key
from megatron_vcppo.errors import UserError

MARKDOWN_HEAD = """# Configuration keys

<!-- Made by `vcppo config --explain --markdown > docs/configuration.md` from megatron_vcppo/config/sections/. -->

A configuration is a YAML file that overrides these defaults; `key=value` on the command line overrides both, with the
section in front: `ppo.optimizer.lr=2e-6`. Ranges are in interval notation: [0, 1) contains 0 and not 1.
`null` is YAML's empty value. `vcppo config FILE` checks a file and prints it with all defaults.
"""


def explain(prefix: str) -> str:
    """Every key below ``prefix`` ("": all), section by section, as plain text. UserError if there is none."""
    lines = []
    for section, keys in _by_section(prefix):
        lines += ["", f"[{section}] {_section_text(section)}"] if section else []
        for key in keys:
            lines.append(f"  {key.name}: {key.type_text} ({_default(key, 'default ')})")
            lines += [f"      {line}" for line in textwrap.wrap(key.doc, 104, break_on_hyphens=False)]
    return "\n".join(lines).strip("\n") + "\n"


def explain_markdown(prefix: str = "") -> str:
    """The same as a Markdown page, with one table per section."""
    lines = [MARKDOWN_HEAD]
    for section, keys in _by_section(prefix):
        lines += [f"## {section}", "", _section_text(section), ""] if section else ["## Top level", ""]
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        for key in keys:
            cells = [f"`{key.name.rpartition('.')[2]}`", key.type_text, f"`{_default(key)}`", key.doc]
            escaped = [cell.replace("|", r"\|") for cell in cells]
            lines.append(f"| {' | '.join(escaped)} |")
        lines.append("")
    return "\n".join(lines).rstrip("\n") + "\n"


def _by_section(prefix: str) -> Iterator[tuple[str, list[Key]]]:
    """Sections in the order of their first keys; "" holds the keys at the top level."""
    sections: dict[str, list[Key]] = {}
    for key in all_keys().values():
        if not prefix or key.name == prefix or key.name.startswith(f"{prefix}."):
            sections.setdefault(key.name.rpartition(".")[0], []).append(key)
    if not sections:
        near = nearest_key(prefix)
        hint = f"did you mean {near}?" if near else "vcppo config --explain lists all"
        raise UserError(f"no configuration key starts with {prefix}; {hint}")
    yield from sections.items()


def _section_text(section: str) -> str:
    return " ".join(all_sections()[section].split())


def _default(key: Key, label: str = "") -> str:
    return "required" if key.default == MISSING else label + json.dumps(key.default, ensure_ascii=False)
