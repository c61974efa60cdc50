"""manifest.json: what a complete folder holds, written last; a folder is complete exactly when it verifies.

``{"format": 1, "meta": {…}, "files": {"relative/path": {"size": bytes, "xxh3": hex digest}}}``
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from megatron_vcppo.errors import UserError
from megatron_vcppo.run.files import open_file, read_json, sync, write_json

MANIFEST_NAME = "manifest.json"
FORMAT = 1
BLOCK_BYTES = 4 << 20
_THREADS = 4


def file_record(path: Path, on_progress: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Size in bytes and xxh3 (128 bit) of a file. The hash is for accidents, not for attackers.

    on_progress is called after every block of a few MB.
    """
    digest = xxhash.xxh3_128()
    block = bytearray(BLOCK_BYTES)
    view = memoryview(block)
    size = 0
    with open_file(path) as stream:
        while count := stream.readinto(block):
            digest.update(view[:count])
            size += count
            on_progress()
    return {"size": size, "xxh3": digest.hexdigest()}


def write_manifest(
    folder: str | Path,
    meta: Mapping[str, Any],
    known: Mapping[str, Mapping[str, Any]] | None = None,
    only: Iterable[str] | None = None,
) -> None:
    """Record the files below ``folder`` and mark it complete: temporary name, fsync, rename.

    ``only`` names the files and sub-folders that count; default: all. ``known`` gives the records (as
    ``file_record`` makes them) of files that were hashed and synced already; all others are read and synced here. An
    earlier manifest is replaced.
    """
    folder = Path(folder)
    known = known or {}
    own_names = (MANIFEST_NAME, f".{MANIFEST_NAME}.tmp")
    roots = [folder] if only is None else [folder / name for name in only]
    names = sorted(
        path.relative_to(folder).as_posix()
        for root in roots
        for path in (root.rglob("*") if root.is_dir() else [root])
        if path.is_file() and path.relative_to(folder).as_posix() not in own_names
    )
    unknown = [name for name in names if name not in known]
    with ThreadPoolExecutor(_THREADS) as pool:
        records = dict(zip(unknown, pool.map(lambda name: _synced_record(folder / name), unknown), strict=True))
    files = {name: dict(known.get(name) or records[name]) for name in names}
    write_json(folder / MANIFEST_NAME, {"format": FORMAT, "meta": dict(meta), "files": files})


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest's content, files not looked at. UserError if there is none or it cannot be read."""
    path = Path(folder) / MANIFEST_NAME
    try:
        content = read_json(path)
        known_format = content["format"] == FORMAT and isinstance(content["meta"], dict)
        complete = known_format and isinstance(content["files"], dict)
    except FileNotFoundError:
        raise UserError(f"{folder}: not a complete checkpoint: no {MANIFEST_NAME}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged: {error}") from None
    if not complete:
        raise UserError(f"{path}: not a manifest of format {FORMAT}")
    for name, record in content["files"].items():
        path_inside(Path(folder), name)
        if not isinstance(record, dict) or set(record) != {"size", "xxh3"} or type(record["size"]) is not int:
            raise UserError(f"{path}: damaged: the record of {name!r} is no size and checksum")
    return content


def path_inside(folder: Path, name: Any) -> Path:
    """``folder``/``name`` for a name that a file in the folder gives. UserError if it leads out of the folder."""
    parts = PurePosixPath(name).parts if isinstance(name, str) else ()
    if not parts or ".." in parts or "/" in parts or "\0" in name:
        raise UserError(f"{folder / MANIFEST_NAME}: damaged: {name!r} is no name inside of the folder")
    return folder / name


def check_links(folder: Path, ignored: Sequence[str] = ()) -> None:
    """UserError if a symbolic link below ``folder`` leads out of it: what came with a folder must not name others.

    ignored: patterns of names; what has one, or is below it, is not looked at.
    """
    home = folder.resolve()
    for path in folder.rglob("*"):
        if any(fnmatch(part, pattern) for part in path.relative_to(folder).parts for pattern in ignored):
            continue
        if path.is_symlink() and not path.resolve().is_relative_to(home):
            raise UserError(f"{path}: a symbolic link that leads out of {folder}; put the file itself there")


def verify_manifest(
    folder: str | Path, checksums: bool = True, on_progress: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Check every recorded file's presence, size and (unless switched off) checksum; return the manifest's meta.

    UserError lists each file that is missing, truncated or corrupt. on_progress is called, from several threads, after
    every few MB.
    """
    folder = Path(folder)
    content = read_manifest(folder)

    def problem(item: tuple[str, Mapping[str, Any]]) -> str | None:
        name, record = item
        path = folder / name
        try:
            size = path.stat().st_size
            if size != record["size"]:
                return f"{name}: {size} bytes, should be {record['size']}"
            if checksums and file_record(path, on_progress) != record:
                return f"{name}: corrupt (checksum differs)"
        except OSError as error:
            return f"{name}: {error.strerror or error}"
        return None

    with ThreadPoolExecutor(_THREADS) as pool:
        problems = [text for text in pool.map(problem, content["files"].items()) if text]
    if problems:
        raise UserError(f"{folder}: damaged:\n" + "\n".join(f"  {text}" for text in problems))
    return content["meta"]


def _synced_record(path: Path) -> dict[str, Any]:
    sync(path)
    return file_record(path)
