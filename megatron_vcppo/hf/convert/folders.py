"""Folders that appear under their final name only when complete, and the small files of a Hugging Face folder."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_vcppo.errors import UserError, storage_error
from megatron_vcppo.run.files import move, read_bytes, sync
from megatron_vcppo.run.folder import iteration_name
from megatron_vcppo.run.manifest import MANIFEST_NAME

_SMALL_FILE_SUFFIXES = (".json", ".jsonl", ".txt", ".model", ".jinja", ".tiktoken", ".md")
_INDEX_SUFFIX = ".index.json"
_TEMPLATES = "additional_chat_templates"


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
        if found := storage_error(error, str(final), "run the same command again"):
            raise found from error
        raise UserError(f"{error.filename or final}: {error.strerror or error}") from error


def unfinished(final: Path) -> list[Path]:
    """What processes that were killed left next to ``final``; one that still works on it has such a folder too."""
    return sorted(final.absolute().parent.glob(f"{_partial(final)}*"))


def _partial(final: Path) -> str:
    return f".{final.name}.partial-"


LATEST = "latest_checkpointed_iteration.txt"


def is_megatron_lm(folder: Path) -> bool:
    """Whether a folder looks like one that Megatron-LM saved, and not like one of ours or of Hugging Face."""
    return (folder / LATEST).exists() or ((folder / ".metadata").exists() and not (folder / MANIFEST_NAME).exists())


def iteration_folder(folder: Path) -> Path:
    """The checkpoint in a folder of Megatron-LM: itself, or the one that its latest_checkpointed_iteration.txt names.

    Raises UserError if there is none.
    """
    latest = folder / LATEST
    if latest.exists():
        name = read_bytes(latest).decode(errors="replace").strip()
        if name != "release" and not (name.isascii() and name.isdigit() and len(name) < 19):
            raise UserError(f"{latest}: names {name[:40]!r}, which is no iteration")
        folder = folder / (name if name == "release" else iteration_name(int(name)))  # ours are named like theirs
    if not (folder / ".metadata").is_file():
        raise UserError(f"{folder}: no checkpoint of Megatron-LM in the format torch_dist: it has no .metadata")
    return folder


def small_files(source: Path) -> list[Path]:
    """What travels with the weights: config.json, tokenizer, generation config, chat templates.

    Raises UserError if one is a symbolic link to elsewhere, as a model must not name the user's other files; what a
    snapshot of Hugging Face's cache links to, the blobs of the same model, is fine.
    """
    home = source.resolve()
    blobs = home.parents[1] / "blobs" if home.parent.name == "snapshots" else home
    found = []
    for path in (*sorted(source.iterdir()), *sorted((source / _TEMPLATES).glob("*"))):
        if path.is_file() and path.suffix in _SMALL_FILE_SUFFIXES and not path.name.endswith(_INDEX_SUFFIX):
            file = path.resolve()
            if not file.is_relative_to(home) and file.parent != blobs:
                raise UserError(f"{path}: a symbolic link that leads out of {source}; put the file itself there")
            found.append(path)
    return found


def copy_small_files(source: Path, target: Path) -> None:
    """Copy ``small_files`` of a folder. Raises UserError as they do."""
    target.mkdir(exist_ok=True)
    for path in small_files(source):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
