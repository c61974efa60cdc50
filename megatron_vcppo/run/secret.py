"""The secret of an attempt: made once, kept in a file of mode 0600; and how processes prove that they hold it.

A torch store has no password: whoever reaches its port may set its keys, and would be taken for a rank. So ranks that
meet in a store first prove to rank 0, and it to them, that they hold the secret, which itself is never sent. Numbers
that are drawn for each meeting keep a proof from being used twice. What follows stands under a prefix that a stranger
cannot compute, though the store tells it to who asks (SECURITY.md says what is left).
"""

import datetime
import hashlib
import hmac
import os
import secrets
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from megatron_vcppo.errors import UserError

SECRET_FILE_VARIABLE = "VCPPO_SECRET_FILE"
"""Names the file in a role's environment: anyone may list a process's arguments, and jobs' environments are stored."""


PROOF_BYTES = 32
"""Of a rank's number and proof within a group."""


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
    """The attempt's secret. Raises UserError if others may read the file."""
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise UserError(f"{path}: the run's secret is readable by others (mode {mode:04o}); run chmod 600 on it")
    return path.read_text().strip()


def own_secret() -> str | None:
    """The secret that this process was started with; None outside of an attempt. Raises UserError as read_secret."""
    path = os.environ.get(SECRET_FILE_VARIABLE)
    return read_secret(Path(path)) if path else None


class KeyStore(Protocol):
    """What ``prove`` needs of a torch store."""

    def set(self, key: str, value: str, /) -> None:
        """Give a key its value."""

    def get(self, key: str, /) -> bytes:
        """The value of a key."""

    def wait(self, keys: list[str], timeout: datetime.timedelta, /) -> None:
        """Wait for keys; torch's DistStoreError after the timeout."""


def hello_key(rank: int) -> str:
    """Where a rank's proof is."""
    return f"hello/{rank}"


def seen_key(rank: int) -> str:
    """Where a rank says that rank 0 has proved itself."""
    return f"seen/{rank}"


def prove(
    store: KeyStore, secret: str, group: str, rank: int, world_size: int, left: Callable[[], datetime.timedelta]
) -> str:
    """Returns when every rank has proved to rank 0, and rank 0 to this one, that it holds the secret; collective.

    Rank 0 also waits until each of them has taken its proof: a stranger may answer in its place, and the rank that
    turns away then must not be waited for, and replaced, in the group that follows.

    Args:
        store: where the ranks meet; each meeting has its own.
        secret: the same on all of them.
        group: what they meet for, in messages; a proof for one group is none for another.
        rank, world_size: of this process and the group.
        left: what is left of the time for it.

    The result (hex) is a prefix for the keys of the group, which only holders of the secret know. Raises UserError if a
    rank has given no proof or a wrong one; what ``store.wait`` raises if one has not come in time.
    """

    def mac(*parts: object) -> str:
        text = "|".join(map(str, (group, world_size, *parts)))
        return hmac.new(secret.encode(), text.encode(), hashlib.sha256).hexdigest()

    def awaited(key: str) -> str:
        store.wait([key], left())
        return store.get(key).decode("ascii", "replace")

    def check(proof: str, expected: str, peer: int) -> None:
        if not hmac.compare_digest(proof.encode(), expected.encode()):
            raise _stranger(peer, group)

    own = secrets.token_hex(16)
    if rank == 0:
        store.set("challenge", own)
        numbers = []
        for peer in range(1, world_size):
            number, _, proof = awaited(hello_key(peer)).partition(" ")
            check(proof, mac("rank", peer, own, number), peer)
            numbers.append(number)
        for peer, number in enumerate(numbers, 1):
            store.set(f"answer/{peer}", mac("main", peer, own, number))
        for peer, number in enumerate(numbers, 1):
            check(awaited(seen_key(peer)), mac("seen", peer, own, number), peer)
        return mac("keys", own)
    challenge = awaited("challenge")
    store.set(hello_key(rank), f"{own} {mac('rank', rank, challenge, own)}")
    check(awaited(f"answer/{rank}"), mac("main", rank, challenge, own), 0)
    store.set(seen_key(rank), mac("seen", rank, challenge, own))
    return mac("keys", challenge)


def prove_members(gather: Callable[[bytes], Sequence[bytes]], secret: str, group: str, rank: int) -> None:
    """Returns when every rank of a group has proved to this one, through the group, that it holds the secret.

    A store tells its keys to who asks, and gloo and NCCL connect to whoever comes in a peer's place: so the ranks that
    are connected prove it once more, before anything else goes through the group. Collective.

    gather: what each rank gives, PROOF_BYTES of it, by rank. Raises UserError if one gives a wrong proof.
    """
    numbers = hashlib.sha256(b"".join(gather(secrets.token_bytes(PROOF_BYTES)))).digest()

    def proof(member: int) -> bytes:
        return hmac.new(secret.encode(), f"{group}|member|{member}|".encode() + numbers, hashlib.sha256).digest()

    for member, given in enumerate(gather(proof(rank))):
        if not hmac.compare_digest(given, proof(member)):
            raise _stranger(member, group)


def _stranger(rank: int, group: str) -> UserError:
    return UserError(
        f"rank {rank} of {group} does not hold the run's secret: a stranger has taken its place; "
        "start again, and see SECURITY.md"
    )
