"""Data sets by name: from the hub, or from the cache where the hub cannot be reached."""

import errno
import functools
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron_vcppo.errors import UserError

CACHE_REFUSED = (errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
"""`datasets` writes what it loads to its cache, by default in the home directory."""
ANSWER_TIMEOUT_S = 2.0
"""A hub that does not answer a first request within this time is treated as out of reach."""


def open_hub_dataset(source: str, split: str) -> Any:
    """The data set ``name``, ``name:split`` or ``name:configuration:split``, as `datasets` loads it.

    Where the hub does not answer, only the cache is read. Raises UserError if the data set is in neither.
    """
    name, *rest = source.split(":")
    split = rest[-1] if rest else split
    is_reachable = hub_answers()
    import datasets  # slow to import, and most runs read JSONL

    try:
        with _offline(not is_reachable):
            return datasets.load_dataset(name, rest[0] if len(rest) > 1 else None, split=split)
    except Exception as error:  # `datasets` raises many kinds; each means that the source cannot be read
        if isinstance(error, OSError) and error.errno in CACHE_REFUSED:
            raise UserError(
                f"cannot read the data set {source}: {error.filename or 'the cache of `datasets`'}: {error.strerror}: "
                "set HF_HOME to a folder that can be written"
            ) from error
        if not is_reachable:
            raise UserError(
                f"cannot read the data set {source}: it is no file or folder here, it is not in the cache of "
                f"`datasets`, and {_endpoint()} does not answer; give a file, or load it once where there is a network"
            ) from error
        raise UserError(f"cannot read the data set {source}: {' '.join(str(error).split())[:300]}") from error


@functools.cache
def hub_answers() -> bool:
    """Whether the hub answers any request, through a proxy if the environment names one; asked once per process.

    False at once if HF_HUB_OFFLINE or HF_DATASETS_OFFLINE says so.
    """
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return False
    answered = threading.Event()

    def ask() -> None:
        try:
            request = urllib.request.Request(_endpoint(), method="HEAD")
            urllib.request.urlopen(request, timeout=ANSWER_TIMEOUT_S).close()
        except urllib.error.HTTPError:
            pass  # an answer, too
        except (OSError, ValueError):
            return
        answered.set()

    # In a thread: looking up the name of a host has no time limit of its own.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(ANSWER_TIMEOUT_S + 0.5)
    return answered.is_set()


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


@contextmanager
def _offline(wanted: bool) -> Iterator[None]:
    """Meanwhile `datasets` and huggingface_hub ask no server, which they would do six times with growing pauses."""
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    if wanted:
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before
