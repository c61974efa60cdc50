"""Section ``cluster``, usually overridden by a profile from configs/cluster/."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_vcppo.config.ranges import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

LOCAL = "local"
"""The cluster that is this machine."""


@dataclass
class ClusterConfig:
    """This machine (name: local) or a Slurm cluster, its limits and the layout of a job on it."""

    name: str = LOCAL
    """local: the roles are processes on this machine. Any other name: jobs on the Slurm cluster that sbatch reaches."""
    partition: str | None = None
    """Slurm partition; null: the cluster's default."""
    account: str | None = None
    """Slurm account; null: the cluster's default."""
    qos: str | None = None
    """Slurm quality of service; null: the cluster's default."""
    wckey: str | None = None
    """Slurm workload characterization key; null: none."""
    trainer_nodes: PositiveInt = 1
    """Nodes that run the trainer's ranks. Of them, export takes one; evaluate the fewest that hold a replica of the
    model, if engines are on rollout nodes (overrides.evaluate decides otherwise)."""
    rollout_nodes: NonNegativeInt = 0
    """Nodes that run only engines."""
    engines_on: Literal["rollout_nodes", "trainer_nodes", "trainer_gpus"] | None = None
    """rollout_nodes: engines have their own nodes. trainer_nodes: they share the trainer's nodes, on other GPUs: the
    trainer uses the first GPUs of each node, the engines the last. trainer_gpus: they also share its GPUs; engines
    sleep while the trainer works, and the trainer's state is in host memory while they generate. Default:
    rollout_nodes if cluster.rollout_nodes > 0, else trainer_nodes."""
    trainer_ranks: PositiveInt | None = None
    """Trainer ranks over all nodes. Default: one per GPU; without GPUs tp × pp × cp × dp."""
    gpus_per_node: NonNegativeInt = 0
    """GPUs per node; 0: CPU only."""
    gpu_memory_gib: PositiveFloat | None = None
    """Memory of one GPU in GiB. If set, the memory plan is checked before anything is queued."""
    cpus_per_node: PositiveInt = 1
    """CPUs that a job requests per node."""
    threads_per_rank: PositiveInt | None = None
    """Threads with which a trainer rank computes on the CPU. Default: the CPUs of its node (cpus_per_node; of this
    machine, those that the process may use) divided by the ranks on it, at least 1."""
    memory_per_node_gb: PositiveFloat | None = None
    """Main memory in GB that a job requests per node; null: the cluster's default."""
    time_limit_minutes: PositiveInt = 60
    """Time limit of one job; a stage that needs longer is requeued until it is done."""
    stage_time_limit_minutes: dict[str, PositiveInt] = field(default_factory=dict)
    """stage: time limit of its jobs, instead of time_limit_minutes."""
    save_margin_s: NonNegativeInt = 300
    """Seconds before the time limit at which the trainer is told to save, until this run has measured how long a save
    takes."""
    setup: list[str] = field(default_factory=list)
    """Shell lines at the top of the batch script, such as module load … or source …/activate."""
    python: str | None = None
    """Python interpreter on the nodes. Default: the interpreter that runs `vcppo submit`."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of every role."""
    network_interface: str | None = None
    """Network of all communication in a run (engines, gloo, NCCL, weights): an interface that every node has, such as
    ib0, or, on one node, an IPv4 address. Default: loopback on one node, else the interface of the default route."""
    link_gb_per_s: PositiveFloat | None = None
    """Bandwidth of one node's links in one direction in GB/s, to which `vcppo doctor` compares a collective of all GPUs
    and from which `vcppo plan` estimates pushes. Default: what the node reports of its InfiniBand ports, else of the
    interface; in a plan 50 (400 Gbit/s) for each GPU."""
    node_cache: str | None = None
    """Folder for compiled kernels (Triton, torch, vLLM, CUDA) on a node-local disk; created by every role, readable
    only by its user. Default: vcppo-cache-UID below $TMPDIR or /tmp."""
    container_image: str | None = None
    """Image in which the roles run (tools/containers); null: they run directly on the nodes."""
    container_python: str | None = None
    """Python interpreter inside container_image. Default: cluster.python, or the path of the submitting interpreter."""
    container_mounts: str | None = None
    """Folders of the node to mount in the image, such as /shared:/shared; must contain run, model and data."""
    container_runtime: Literal["pyxis", "apptainer"] = "pyxis"
    """Starts the roles inside container_image; the controller runs on the host."""
    sbatch: dict[str, str] = field(default_factory=dict)
    """Additional sbatch options by long name, such as {constraint: ib, exclusive: "true", mem-per-cpu: 8G}. gres (such
    as gpu:h100:8) replaces the request that follows from gpus_per_node, also that of every srun step; export, which
    requests no GPUs, leaves it and exclusive out."""
    srun: dict[str, str] = field(default_factory=dict)
    """Additional options of every srun step by long name, such as {mpi: none, network: no_vni, unbuffered: "true"}."""
    rollout_restarts: NonNegativeInt = 5
    """Restarts of one rollout node's engines within a job if they die while the trainer lives."""
    crash_retries: NonNegativeInt = 2
    """Consecutive restarts of a stage whose ranks were killed, without a new checkpoint in between."""
    stop_grace_s: NonNegativeFloat = 10.0
    """Seconds between SIGTERM and SIGKILL."""
