"""The folder in a run where engines publish their addresses: one small file per engine, and their common secret."""

from pathlib import Path

import msgspec

from megatron_vcppo.run.files import write_bytes
from megatron_vcppo.run.folder import SECRET_NAME

SECRET = SECRET_NAME


class Engine(msgspec.Struct, frozen=True):
    """One engine that has answered its first health check."""

    node: int
    index: int
    incarnation: int
    """Counts the starts of this engine: a restarted one has other weights and another port."""
    address: str
    port: int
    pid: int

    @property
    def name(self) -> str:
        """engine_NODE_INDEX."""
        return f"engine_{self.node}_{self.index}"

    @property
    def url(self) -> str:
        """Where its HTTP server is."""
        return f"http://{self.address}:{self.port}"

    @property
    def place(self) -> str:
        """What requests are for: this start of this engine, not another process at the same port."""
        return f"{self.address}:{self.port}, start {self.incarnation} of {self.name}"

    def __str__(self) -> str:
        return f"{self.name} at {self.address}:{self.port} (start {self.incarnation})"


def publish(folder: Path, engine: Engine) -> None:
    """Make an engine known."""
    write_bytes(folder / f"{engine.name}.json", msgspec.json.encode(engine))


def withdraw(folder: Path, engine: Engine) -> None:
    """Take an engine off the list; it need not be on it."""
    (folder / f"{engine.name}.json").unlink(missing_ok=True)


def engines(folder: Path) -> list[Engine]:
    """The engines known now, in order of node and index."""
    found = []
    for path in folder.glob("engine_*.json"):
        try:
            found.append(msgspec.json.decode(path.read_bytes(), type=Engine))
        except FileNotFoundError:  # withdrawn between the listing and the reading
            continue
    return sorted(found, key=lambda engine: (engine.node, engine.index))
