"""Folders that appear under their final name only when complete, and the small files of a Hugging Face folder."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_vcppo.errors import UserError
from megatron_vcppo.run.files import move, sync

_SMALL_FILE_SUFFIXES = (".json", ".jsonl", ".txt", ".model", ".jinja", ".tiktoken", ".md")
_INDEX_SUFFIX = ".index.json"


@contextmanager
def new_folder(final: Path, needed_bytes: int) -> Iterator[Path]:
    """A folder next to ``final`` to fill; at the end it is synced to disk and renamed, on an exception removed.

    Raises UserError if ``final`` exists and is not empty, the disk is too small, or the system refuses to write.
    """
    final = Path(os.path.abspath(final))
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise UserError(f"{final}: exists already; choose another folder or remove it")
    temporary = final.parent / f"{_partial(final)}{os.getpid()}"
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(final.parent).free
        if free_bytes < needed_bytes:
            raise UserError(f"{final.parent}: {needed_bytes:,} bytes needed, {free_bytes:,} free")
        temporary.mkdir()
        try:
            yield temporary
            sync(temporary)
            move(temporary, final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{error.filename or final}: {error.strerror or error}") from error


def unfinished(final: Path) -> list[Path]:
    """What processes that were killed left next to ``final``; one that still works on it has such a folder too."""
    return sorted(final.absolute().parent.glob(f"{_partial(final)}*"))


def _partial(final: Path) -> str:
    return f".{final.name}.partial-"


def copy_small_files(source: Path, target: Path) -> None:
    """Copy what travels with the weights: config.json, tokenizer, generation config, chat templates."""
    target.mkdir(exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in _SMALL_FILE_SUFFIXES and not path.name.endswith(_INDEX_SUFFIX):
            shutil.copyfile(path, target / path.name)
        elif path.is_dir() and path.name == "additional_chat_templates":
            shutil.copytree(path, target / path.name)
