"""The code of a run, kept in its folder, so that a job that starts tomorrow runs what was submitted today."""

import hashlib
import os
import shutil
from pathlib import Path

import megatron_vcppo
from megatron_vcppo.run.files import replacing
from megatron_vcppo.run.folder import RunFolder


def sources() -> dict[str, Path]:
    """Every Python file of the installed package, by its path below the import root."""
    root = Path(str(megatron_vcppo.__file__)).parent
    files = {}
    for folder, _, names in os.walk(root, followlinks=True):  # in a checkout slurm/ is a link
        for name in names:
            if name.endswith(".py"):
                path = Path(folder) / name
                files[path.relative_to(root.parent).as_posix()] = path
    return dict(sorted(files.items()))


def take_snapshot(run: RunFolder) -> Path:
    """Copy the code to RUN/code/HASH unless that copy is there; returns the folder, to be put on PYTHONPATH.

    Only for the holder of the run's lock.
    """
    files = sources()
    digest = hashlib.sha256()
    for name, path in files.items():
        digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    final = run.code / digest.hexdigest()[:12]
    if final.exists():
        return final
    run.code.mkdir(exist_ok=True)
    with replacing(final) as folder:
        for name, path in files.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    return final
