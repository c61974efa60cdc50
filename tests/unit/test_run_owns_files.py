"""run/ alone knows where a run's files are and puts them in place: read from the source of every other module."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.source import ROOT, modules, part_of

FILES = {
    "config.yaml",
    "events.jsonl",
    "metrics.jsonl",
    "profiles.jsonl",
    "startup.jsonl",
    "results.json",
    "results.md",
    "manifest.json",
    "state.json",
    "set.json",
    "origin.json",
    "wandb_run_id",
}
FOLDERS = {"checkpoints", "rollouts", "rendezvous", "logs", "code"}
PREFIXES = ("iter_", "attempt_", "partial_")
"""Of names that end in a number."""
EXCEPTIONS = {
    "mcore/checkpoint_writer.py": "streams gigabytes of tensors and hashes them on the way, into a folder not in place",
    "rewards/sandbox/inside/scratch.py": "runs inside the sandbox, without the package",
}

MAY_OPEN = {
    "run/files.py": "has the opener",
    "run/events.py": "reads /proc",
    "run/processes.py": "reads /proc",
    "run/secret.py": "reads what it wrote itself, for this user alone",
    "data/readers.py": "reads a CSV file as text, which it knows to be a file",
}


def others() -> list[Path]:
    return [path for path in modules("megatron_vcppo") if part_of(path) != "run"]


def docstrings(tree: ast.Module) -> set[int]:
    """The identities of all string statements."""
    return {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}


def texts(node: ast.AST) -> Iterator[str]:
    """The literal text of a string or an f-string, from its beginning."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr) and node.values:
        yield from texts(node.values[0])


def names_a_run_file(text: str) -> bool:
    """A path, not a sentence, with a part that is a name in a run."""
    parts = text.split("/")
    return " " not in text and any(part in FILES or part.startswith("iter_") for part in parts)


def faults(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and description of what only run/ may do."""
    ignored = docstrings(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner, name = node.func.value, node.func.attr
            of_os = isinstance(owner, ast.Name) and owner.id in ("os", "shutil")
            # str.replace has two arguments, Path.replace one; dataclasses.replace has keywords.
            of_path = name in ("rename", "replace") and len(node.args) == 1 and not node.keywords
            if of_path or (of_os and name in ("replace", "rename", "renames", "move", "fsync")):
                yield node.lineno, f"{ast.unparse(node)}: use run/files.py"
            if name in ("glob", "rglob", "joinpath", "with_name"):
                for text in (text for argument in node.args for text in texts(argument)):
                    if FOLDERS & set(text.split("/")):
                        yield node.lineno, f"{ast.unparse(node)}: use run/folder.py"
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            for text in texts(node.right):
                if FOLDERS & set(text.split("/")):
                    yield node.lineno, f"{ast.unparse(node)}: use run/folder.py"
        if isinstance(node, ast.JoinedStr) and any(text.startswith(PREFIXES) for text in texts(node)):
            yield node.lineno, f"{ast.unparse(node)}: use run/folder.py"
        if isinstance(node, ast.Constant) and id(node) not in ignored and any(map(names_a_run_file, texts(node))):
            yield node.lineno, f"{ast.unparse(node)}: use run/folder.py"


@pytest.mark.parametrize("path", others(), ids=lambda path: str(path.relative_to(ROOT)))
def test_only_run_names_and_places_the_files_of_a_run(path: Path) -> None:
    found = [f"{path}:{line}: {what}" for line, what in faults(ast.parse(path.read_text(encoding="utf-8")))]
    if str(path.relative_to(ROOT / "megatron_vcppo")) in EXCEPTIONS:
        assert found, f"{path} is no exception any more"
    else:
        assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "code",
    [
        "path.rename(target)",
        "os.replace(a, b)",
        "temporary.replace(path)",
        "folder / 'checkpoints'",
        "folder / stage / 'rollouts'",
        "run.glob('*/metrics.jsonl')",
        "NAME = 'manifest.json'",
        "name = f'iter_{iteration:07d}'",
    ],
)
def test_the_rule_sees(code: str) -> None:
    assert list(faults(ast.parse(code)))


def test_the_exceptions_are_modules() -> None:
    assert all((ROOT / "megatron_vcppo" / path).is_file() for path in (*EXCEPTIONS, *MAY_OPEN))


def opened(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of each call that opens a file to read it."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        modes = [one.value for one in node.args if isinstance(one, ast.Constant) and isinstance(one.value, str)]
        reads = name == "open" and ("rb" in modes or any(word.arg == "encoding" for word in node.keywords))
        if (name in ("read_text", "read_bytes") and isinstance(node.func, ast.Attribute)) or reads:
            yield node.lineno, ast.unparse(node)


@pytest.mark.parametrize("part", ["commands", "data", "hf", "mcore", "report", "run"])
def test_files_from_elsewhere_have_one_opener(part: str) -> None:
    """run/files.py waits for no pipe; runs, models, checkpoints and data may be anybody's."""
    for path in modules(f"megatron_vcppo/{part}"):
        found = [f"{path}:{line}: {call}: use run/files.py" for line, call in opened(ast.parse(path.read_text()))]
        may = str(path.relative_to(ROOT / "megatron_vcppo")) in MAY_OPEN
        assert bool(found) == may, "\n".join(found) or f"{path} is no exception any more"


def test_the_rule_of_the_opener_sees() -> None:
    for code in ("open(path, 'rb')", "path.open('rb')", "path.read_text()", "path.open(encoding='utf-8')"):
        assert list(opened(ast.parse(code))), code
    for code in ("open_file(path)", "path.open('wb')", "read_text(path)"):
        assert not list(opened(ast.parse(code))), code


def test_the_rule_leaves_other_text_alone() -> None:
    for code in ("text.replace('a', 'b')", "replace(config, lr=1)", "startup.done('rollouts')", "'no manifest.json'"):
        assert not list(faults(ast.parse(code))), code
