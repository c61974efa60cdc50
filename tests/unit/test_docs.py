"""What the documents point to is there: links, anchors, and the files that they name."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_vcppo.config.keys import all_keys
from megatron_vcppo.config.load import load_config
from tests.helpers.source import ROOT, modules

DOCS = sorted(
    path for folder in (".", "docs", "docs/decisions", "tools/containers") for path in (ROOT / folder).glob("*.md")
)
NAMED_FROM = (ROOT, ROOT / "megatron_vcppo", ROOT / "docs")
"""The folders to which the documents' file names are relative."""
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.MULTILINE)
_FILE = re.compile(r"\b[a-z0-9_]+(?:/[a-z0-9_.-]+)*/[a-z0-9_.-]+\.(?:py|sh|md|def)\b")
"""A path with a folder, in lower case: RUN/… and FOLDER/… are examples."""
_MODULE = re.compile(r"(?<![\w/.-])[a-z_][a-z0-9_]*\.py\b")
"""A module without its folder."""
EXAMPLES = {"my_rewards.py", "solution.py", "train.py"}
"""Modules of a user, or of a program."""
FIELDS = {"reward_model.ground_truth"}
"""Of published data, which are written like keys."""
FORMER_KEYS = {"rollout.interface"}
"""Keys that are gone, which a document mentions as such."""


def prose(path: Path) -> str:
    """A document without its fenced blocks."""
    return _FENCE.sub("", path.read_text(encoding="utf-8"))


def anchors(path: Path) -> set[str]:
    """The ids that a Markdown viewer gives to the headings: lower case, no punctuation, hyphens for spaces."""
    headings = (re.sub(r"\]\([^)]*\)", "", heading) for heading in _HEADING.findall(prose(path)))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(path: Path) -> Iterator[tuple[Path, str]]:
    """The file and the anchor ("" for none) of each link that stays inside the project."""
    for target in _LINK.findall(prose(path)):
        if not re.match(r"[a-z]+:", target):
            name, _, anchor = target.partition("#")
            yield ((path.parent / name).resolve() if name else path), anchor


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for target, anchor in links(path):
        assert target.exists(), f"{path.name}: no file {target}"
        assert not anchor or anchor in anchors(target), f"{path.name}: {target.name} has no heading #{anchor}"


@pytest.mark.parametrize("path", [path for path in DOCS if path.name != "CHANGELOG.md"], ids=lambda path: path.name)
def test_files_that_are_named_exist(path: Path) -> None:
    """But those in the changelog, which also names what is gone."""
    named = set(_FILE.findall(prose(path)))
    missing = {name for name in named if not any((folder / name).exists() for folder in NAMED_FROM)}
    assert not missing, f"{path.name} names {sorted(missing)}"


def test_modules_that_are_named_exist() -> None:
    """In documents, docstrings and comments, where a module is named without its folder."""
    package = modules("megatron_vcppo")
    there = {
        path.name for folder in ("megatron_vcppo", "tools", "tests", "examples") for path in modules(folder)
    } | EXAMPLES
    for path in [*package, *(path for path in DOCS if path.name != "CHANGELOG.md")]:
        missing = set(_MODULE.findall(path.read_text(encoding="utf-8"))) - there
        assert not missing, f"{path} names {sorted(missing)}"


@pytest.mark.parametrize("path", [path for path in DOCS if path.name != "CHANGELOG.md"], ids=lambda path: path.name)
def test_keys_that_are_named_exist(path: Path) -> None:
    keys = all_keys()
    known = {".".join(key.split(".")[:depth]) for key in keys for depth in range(1, 5)} | FORMER_KEYS | FIELDS
    sections = "|".join(sorted({key.partition(".")[0] for key in keys}))
    spans = " ".join(re.findall(r"`([^`]+)`", prose(path)))
    named = set(re.findall(rf"(?<![\w./])(?:{sections})(?:\.[a-z0-9_]+)+(?![\w/])", spans))
    missing = {key for key in named - known if not key.endswith((".md", ".py", ".sh", ".yaml", ".json", ".jsonl"))}
    assert not missing, f"{path.name} names {sorted(missing)}"


def test_the_tutorials_configuration_is_valid(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    run, cluster = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "run.yaml").write_text(run, encoding="utf-8")
    (tmp_path / "cluster.yaml").write_text(cluster, encoding="utf-8")
    assert load_config(tmp_path / "run.yaml", profiles=[tmp_path / "cluster.yaml"]).prompts.verifiers


def test_every_document_is_in_an_index() -> None:
    """The README links all of docs/, and the decisions' index all decisions."""
    for index, folder in (("README.md", "docs"), ("docs/decisions/README.md", "docs/decisions")):
        linked = {target for target, _ in links(ROOT / index)}
        missing = {path.name for path in (ROOT / folder).glob("*.md") if path.name != "README.md"} - {
            target.name for target in linked
        }
        assert not missing, f"{index} does not link {sorted(missing)}"
