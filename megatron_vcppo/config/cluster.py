"""Where the stages run: the section ``cluster``, overridden by the profiles in configs/cluster/."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class ClusterConfig:
    """This machine (name: local) or a Slurm cluster, its limits and the layout of a job on it."""

    name: str = "local"
    """local: the roles are processes on this machine; any other name: jobs of the Slurm that sbatch reaches."""
    partition: str | None = None
    """Slurm's partition; null: the cluster's default, as for account and qos."""
    account: str | None = None
    """Slurm's account."""
    qos: str | None = None
    """Slurm's quality of service."""
    trainer_nodes: int = 1
    """Nodes that hold the trainer's ranks."""
    rollout_nodes: int = 0
    """Nodes that only run engines."""
    engines_on: Literal["rollout_nodes", "trainer_nodes", "trainer_gpus"] | None = None
    """rollout_nodes: engines have nodes of their own. trainer_nodes: they share the trainer's nodes, on other GPUs: the
    trainer takes the first ones of each node, the engines the last. trainer_gpus: they share its GPUs, too; engines
    sleep while the trainer works, and the trainer's state is in host memory while they generate. Default:
    rollout_nodes if there are any, else trainer_nodes."""
    trainer_ranks: int | None = None
    """Ranks of the trainer over all its nodes. Default: one per GPU, and without GPUs tp × pp × cp × dp."""
    gpus_per_node: int = 0
    """GPUs of each node; 0: CPU only."""
    gpu_memory_gib: float | None = None
    """Memory of one GPU; given, the memory plan is checked before anything is queued."""
    cpus_per_node: int = 1
    """CPUs that a job requests of each node."""
    memory_per_node_gb: float | None = None
    """Main memory requested per node. Default: the cluster's default."""
    time_limit_minutes: int = 60
    """Time limit of one job; a stage that needs longer is requeued as often as it takes."""
    stage_time_limit_minutes: dict[str, int] = field(default_factory=dict)
    """Time limits of single stages, by name."""
    save_margin_s: int = 300
    """How long before the time limit the trainer is asked to save, until this run has measured what a save needs."""
    setup: list[str] = field(default_factory=list)
    """Shell lines at the head of the batch script: module load …, source …/activate."""
    python: str | None = None
    """The interpreter on the nodes. Default: the one that submits."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables for every role."""
    network_interface: str | None = None
    """The network of everything in a run (engines, gloo, NCCL, weights): an interface that every node has, such as ib0,
    or, with one node, an IPv4 address. Default: loopback on one node, else the interface of the default route."""
    link_gb_per_s: float | None = None
    """What the links of one node carry in one direction, in GB/s, with which `vcppo doctor` compares a collective of
    all GPUs. Default: what the node says of its InfiniBand ports, else of the interface."""
    node_cache: str | None = None
    """Folder for compiled kernels (Triton, torch, vLLM, CUDA), on a disk of the node's own; made by every role,
    readable by its user alone. Default: vcppo-cache-UID below $TMPDIR or /tmp."""
    container_image: str | None = None
    """Image in which the roles run (tools/containers); null: they run on the nodes' own system."""
    container_python: str | None = None
    """The interpreter inside container_image. Default: the same path as outside, cluster.python."""
    container_mounts: str | None = None
    """Folders of the node inside the image, such as /shared:/shared; run, model and data must be in them."""
    container_runtime: Literal["pyxis", "apptainer"] = "pyxis"
    """What starts the roles inside container_image; the controller runs on the host."""
    sbatch: dict[str, str] = field(default_factory=dict)
    """Further sbatch options by long name, such as {reservation: big, exclusive: "true"}."""
    rollout_restarts: int = 5
    """How often one rollout node's engines are started again within a job when they die alone."""
    crash_retries: int = 2
    """How often in succession a stage whose ranks were killed is started again without a new checkpoint."""
    stop_grace_s: float = 10.0
    """Between the polite and the hard end of a process."""
