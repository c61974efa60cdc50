"""The secret of a run: made once, kept in a file of mode 0600, checked on every request that reaches an engine.

vLLM's own ``--api-key`` guards only part of its routes, and the unguarded ones run code for whoever reaches the port.
"""

import hmac
import os
import secrets
import stat
from pathlib import Path

from megatron_vcppo.errors import UserError

SECRET_FILE_VARIABLE = "VCPPO_ROLLOUT_SECRET_FILE"


def make_secret(path: Path) -> None:
    """Write a new secret to path, mode 0600, unless one is there; several processes may call this at once."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_urlsafe(32))
    try:
        os.link(temporary, path)  # the first one wins; the others read what it wrote
    except FileExistsError:
        pass
    finally:
        temporary.unlink()


def read_secret(path: Path) -> str:
    """The run's secret. Raises UserError if others may read the file."""
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise UserError(f"{path}: the rollout secret is readable by others (mode {mode:04o}); run chmod 600 on it")
    return path.read_text().strip()


def bearer(secret: str) -> dict[str, str]:
    """The header that a request must carry."""
    return {"Authorization": f"Bearer {secret}"}


def is_authorized(headers: list[tuple[bytes, bytes]], secret: str) -> bool:
    """True if exactly one Authorization header is there and holds the secret; compared in constant time."""
    given = [value for name, value in headers if name.lower() == b"authorization"]
    return len(given) == 1 and hmac.compare_digest(given[0], f"Bearer {secret}".encode())
