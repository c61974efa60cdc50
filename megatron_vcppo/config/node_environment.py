"""What a role sets up on its node before it starts: the network of gloo and NCCL, node-local caches. No torch."""

import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

from megatron_vcppo.config.network import node_network
from megatron_vcppo.config.sections.cluster import ClusterConfig
from megatron_vcppo.errors import UserError

CACHES = {
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "torchinductor",
    "VLLM_CACHE_ROOT": "vllm",
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
    "CUDA_CACHE_PATH": "cuda",
}
"""Variable → folder below cluster.node_cache. In a shared home directory many engines would lock and overwrite each
other's compiled kernels, and load a network file system at every start."""


def node_environment(cluster: ClusterConfig, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables of a role on this node, without those already set in ``environment``; makes the cache folder.

    Raises UserError if the node lacks the interface, or the folder cannot be made or belongs to someone else.
    """
    interface = node_network(cluster, environment).interface
    cache = private_folder(Path(cluster.node_cache) if cluster.node_cache else default_cache(environment))
    variables = dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), interface)
    variables |= {name: str(cache / folder) for name, folder in CACHES.items()}
    return {name: value for name, value in variables.items() if not environment.get(name)}


def default_cache(environment: Mapping[str, str] = os.environ) -> Path:
    """A folder of this user on the node-local disk: below $TMPDIR, or below /tmp."""
    return Path(environment.get("TMPDIR") or tempfile.gettempdir()) / f"vcppo-cache-{os.getuid()}"


def private_folder(path: Path) -> Path:
    """Make the folder, readable only by its user. UserError if that is not possible, or if another user made it."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise UserError(f"cluster.node_cache: {path} cannot be made: {error.strerror}; set another folder") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise UserError(f"cluster.node_cache: {path} belongs to another user; set another folder")
    if found.st_mode & 0o077:
        path.chmod(0o700)
    return path
