"""The store over which the ranks of a world meet; apart from runtime.py, which imports Megatron."""

import datetime
import os

import torch.distributed as dist

from megatron_vcppo.config.network import is_address, listen
from megatron_vcppo.run.secret import own_secret, prove

WORLD = "the trainer's world"
"""Name of the group in messages and proofs."""


def ranks_store(rank: int, world_size: int, timeout: datetime.timedelta) -> dist.Store:
    """Where the ranks meet. In an attempt of a run (run/secret.py), all of them have proved that they hold its secret.

    Under torchrun, or started by hand, there is no secret, and whoever reaches the port may be a rank. Raises as
    ``_open_store``, UserError if a stranger has taken a rank, DistStoreError if one does not come in time.
    """
    store = _open_store(rank, world_size, timeout)
    secret = own_secret()
    if secret is None:
        return store
    return dist.PrefixStore(prove(store, secret, WORLD, rank, world_size, lambda: timeout), store)


def _open_store(rank: int, world_size: int, timeout: datetime.timedelta) -> dist.TCPStore:
    """The store at MASTER_ADDR:MASTER_PORT. Rank 0 serves it, on that address only, where torch would on all.

    Under torchrun its agent serves the store. Raises OSError if the port is taken, DistStoreError after the timeout.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not (serves and is_address(address)):  # a name may mean another of this node's addresses here than elsewhere
        return dist.TCPStore(address, port, world_size, is_master=serves, timeout=timeout)
    fd = listen(address, port).detach()  # the store closes it
    return dist.TCPStore(address, port, world_size, is_master=True, timeout=timeout, master_listen_fd=fd)
