"""The code of a run, kept in its folder, so that a job that starts tomorrow runs what was submitted today."""

import hashlib
import os
import shutil
from pathlib import Path

import megatron_vcppo
import slurm


def sources() -> dict[str, Path]:
    """Every Python file of the installed packages, by its path below the import root."""
    files = {}
    for package in (megatron_vcppo, slurm):
        root = Path(str(package.__file__)).parent
        for path in sorted(root.rglob("*.py")):
            files[f"{root.name}/{path.relative_to(root).as_posix()}"] = path
    return files


def take_snapshot(run: Path) -> Path:
    """Copy the code to RUN/code/HASH unless that copy is there; returns the folder, to be put on PYTHONPATH."""
    files = sources()
    digest = hashlib.sha256()
    for name, path in files.items():
        digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    final = run / "code" / digest.hexdigest()[:12]
    if final.exists():
        return final
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    for name, path in files.items():
        target = temporary / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    temporary.rename(final)
    return final
