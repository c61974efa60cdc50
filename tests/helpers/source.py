"""What the modules of this repository are and import, read from their source."""

import ast
import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]


def modules(folder: str) -> list[Path]:
    """In a checkout megatron_vcppo/slurm is a link, which rglob does not follow."""
    walk = os.walk(ROOT / folder, followlinks=True)
    return sorted(Path(below) / name for below, _, names in walk for name in names if name.endswith(".py"))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Absolute name and line of everything imported anywhere in a file, type-checking blocks included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def part_of(path: Path) -> str:
    return path.relative_to(ROOT / "megatron_vcppo").parts[0].removesuffix(".py")
