"""The configuration files of the one-machine Slurm: pure text."""

from dataclasses import dataclass
from pathlib import Path

ACCOUNT = "dev"
"""The one account of a cluster with accounting."""
CGROUPS = Path("/sys/fs/cgroup")
FIRST_NODE = 10
"""The last number of the first node's address."""


@dataclass(frozen=True)
class Layout:
    """What the test cluster consists of. Everything it writes is below ``root``."""

    root: Path
    user: str
    ports: tuple[int, ...]
    """Of slurmctld, slurmdbd, MariaDB, then one per node."""
    nodes: int = 3
    cpus: int = 8
    memory_mb: int = 32000
    gpus: int = 2
    """Fake ones: device files that lead to /dev/null; Slurm counts and hands them out like real ones."""
    accounting: bool = False
    memory_limits: bool = False
    """The kernel ends a job that takes more main memory than it requested, as on most sites (``cgroup_conf``)."""
    grace_s: int = 20
    """Between the signal of a preemption and the end of the preempted job."""
    network: str | None = None
    """The first three numbers of the nodes' network; None: all nodes share the machine's."""

    @property
    def head(self) -> str:
        """The address of slurmctld."""
        return f"{self.network}.1" if self.network else "127.0.0.1"

    @property
    def addresses(self) -> list[str]:
        """Of the nodes; on the loopback interface where they have no network of their own."""
        return [f"{self.network or '127.0.0'}.{FIRST_NODE + index}" for index in range(self.nodes)]

    @property
    def node_names(self) -> list[str]:
        """Names that nothing resolves; where nodes share the machine's network, the address by which roles bind."""
        return [f"node{index}" for index in range(self.nodes)] if self.network else self.addresses

    @property
    def munge_socket(self) -> Path:
        """Where munged listens."""
        return self.root / "munge" / "socket"


def slurm_conf(layout: Layout) -> str:
    """slurm.conf. cred_expire=5 brings the delay of a requeue from 121 s to about 6 s."""
    root, ports = layout.root, layout.ports
    settings = {
        "ClusterName": "dev",
        "SlurmctldHost": f"localhost({layout.head})",
        "SlurmctldPort": ports[0],
        "SlurmUser": layout.user,
        "SlurmdUser": layout.user,
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={layout.munge_socket},cred_expire=5",
        "CredType": "cred/munge",
        "StateSaveLocation": root / "state",
        "SlurmdSpoolDir": root / "spool/%n",
        "SlurmctldPidFile": root / "run/slurmctld.pid",
        "SlurmdPidFile": root / "run/slurmd.%n.pid",
        "SlurmctldLogFile": root / "log/slurmctld.log",
        "SlurmdLogFile": root / "log/slurmd.%n.log",
        "MailProg": "/bin/true",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/cgroup" if layout.memory_limits else "task/none",
        "MpiDefault": "none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core_Memory",
        "SlurmdParameters": "config_overrides",
        "SchedulerType": "sched/backfill",
        "SchedulerParameters": "bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0",
        "ReturnToService": 2,
        "JobRequeue": 1,
        "MinJobAge": 3600,
        "KillWait": 5,
        "CompleteWait": 0,
        "SlurmdTimeout": 10,
        "SlurmctldTimeout": 10,
        "MessageTimeout": 10,
        "TCPTimeout": 2,
        "GresTypes": "gpu",
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
        "SlurmctldParameters": "preempt_send_user_signal",
    }
    settings |= (
        accounting_settings(layout) if layout.accounting else {"AccountingStorageType": "accounting_storage/none"}
    )
    lines = [f"{key}={value}" for key, value in settings.items()]
    for name, address, port in zip(layout.node_names, layout.addresses, ports[3:], strict=True):
        lines.append(
            f"NodeName={name} NodeHostname=localhost NodeAddr={address} Port={port} CPUs={layout.cpus} "
            f"RealMemory={layout.memory_mb} Gres=gpu:{layout.gpus} State=UNKNOWN"
        )
    lines.append(
        f"PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=10 GraceTime={layout.grace_s}"
    )
    lines.append("PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=100 PreemptMode=OFF")
    return "\n".join(lines) + "\n"


def accounting_settings(layout: Layout) -> dict[str, object]:
    """slurm.conf's part for a cluster with slurmdbd; AccountingStoragePass is the munge socket.

    As on most sites, a job needs an account that its user belongs to: ``ACCOUNT`` or none, which means the same.
    """
    return {
        "AccountingStorageEnforce": "associations,qos",
        "AccountingStorageType": "accounting_storage/slurmdbd",
        "AccountingStorageHost": layout.head,
        "AccountingStoragePort": layout.ports[1],
        "AccountingStoragePass": layout.munge_socket,
        "AccountingStorageTRES": "gres/gpu",
        "JobAcctGatherType": "jobacct_gather/linux",
    }


def cgroup_conf(layout: Layout) -> str:
    """cgroup.conf: version 1, which needs no systemd; swap is not limited."""
    settings = {"CgroupPlugin": "cgroup/v1", "CgroupAutomount": "no", "CgroupMountpoint": CGROUPS}
    settings |= {"ConstrainRAMSpace": "yes"} if layout.memory_limits else {}
    return "".join(f"{key}={value}\n" for key, value in settings.items())


def memory_cgroup(node: str) -> Path:
    """Where Slurm limits the memory of a node's jobs. Clusters with a node of one name share it."""
    return CGROUPS / "memory" / f"slurm_{node}"


def gres_conf(layout: Layout) -> str:
    """gres.conf: its files must exist, symbolic links to /dev/null do."""
    names = ",".join(layout.node_names)
    return f"NodeName={names} Name=gpu File={layout.root}/gpu/fake[0-{layout.gpus - 1}]\n"


def slurmdbd_conf(layout: Layout, password: str) -> str:
    """slurmdbd.conf: holds the data base's password, so it must be mode 0600."""
    settings = {
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={layout.munge_socket}",
        "DbdHost": "localhost",
        "DbdAddr": layout.head,
        "DbdPort": layout.ports[1],
        "SlurmUser": layout.user,
        "LogFile": layout.root / "log/slurmdbd.log",
        "PidFile": layout.root / "run/slurmdbd.pid",
        "StorageType": "accounting_storage/mysql",
        "StorageHost": "127.0.0.1",
        "StoragePort": layout.ports[2],
        "StorageUser": "slurm",
        "StoragePass": password,
        "StorageLoc": "slurm_acct_db",
    }
    return "".join(f"{key}={value}\n" for key, value in settings.items())
