"""A real Slurm on this machine: munged, slurmctld and several slurmd as virtual nodes; optionally slurmdbd + MariaDB.

From the distribution's packages, as root or an ordinary user, without systemd, everything below one folder; cgroups
only where jobs get memory limits, which needs root. As root every node has its own network namespace and address
(devcluster_net.py); otherwise nodes share the machine's loopback interface. Used by the tests, the demo and
``tools/devcluster.sh``.
"""

import argparse
import contextlib
import json
import os
import pwd
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from megatron_vcppo.errors import DONE, FAILED, USER_ERROR, UserError
from megatron_vcppo.launch.guard import descendants
from megatron_vcppo.run.processes import alive, die_with_parent, free_ports
from megatron_vcppo.slurm import devcluster_net
from megatron_vcppo.slurm.devcluster_conf import (
    ACCOUNT,
    CGROUPS,
    FIRST_NODE,
    Layout,
    cgroup_conf,
    gres_conf,
    memory_cgroup,
    slurm_conf,
    slurmdbd_conf,
)

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
NEEDED_FOR_ACCOUNTING = ("slurmdbd", "mariadbd", "mariadb", "mariadb-install-db", "sacctmgr")
SWITCH = "switch"
"""The process that holds the namespace of the nodes' switch."""
DEFAULT_ROOT = Path(tempfile.gettempdir()) / f"vcppo-devcluster-{os.getuid()}"
SEARCH_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
_children: list["subprocess.Popen[bytes]"] = []
"""Daemons started by this process, kept so that they are reaped."""


def missing_programs(accounting: bool = False) -> list[str]:
    """Programs that are not installed; empty if a cluster can be started."""
    names = NEEDED + (NEEDED_FOR_ACCOUNTING if accounting else ())
    return [name for name in names if shutil.which(name, path=SEARCH_PATH) is None]


class DevCluster:
    """One cluster, in one folder. ``tied`` daemons die with the process that started them."""

    def __init__(self, root: Path, tied: bool = False) -> None:
        self.root, self.tied = root.absolute(), tied
        self.conf = self.root / "slurm.conf"
        self.pid_file = self.root / "run" / "pids.json"

    @property
    def environment(self) -> dict[str, str]:
        """The variables with which Slurm's commands speak to this cluster."""
        return {"SLURM_CONF": str(self.conf), "PATH": SEARCH_PATH}

    def command(self, *argv: str, timeout_s: float = 30.0) -> "subprocess.CompletedProcess[str]":
        """Run one of Slurm's commands against this cluster."""
        env = {**os.environ, **self.environment}
        return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=timeout_s)

    def up(self, nodes: int = 3, accounting: bool = False, memory_limits: bool = False, **sizes: int) -> Layout:
        """Start everything and wait until every node is idle. UserError if programs are missing or it is up."""
        if missing := missing_programs(accounting):
            raise UserError(
                f"not installed: {', '.join(missing)}; tools/install_slurm.sh installs them on Debian and Ubuntu"
            )
        if self.running():
            raise UserError(f"{self.root}: a cluster is running there; take it down first")
        shutil.rmtree(self.root, ignore_errors=True)
        user = pwd.getpwuid(os.getuid()).pw_name
        network = devcluster_net.free_network(self.root) if devcluster_net.possible() else None
        ports = free_ports(3 + nodes, "127.0.0.1")
        layout = Layout(
            self.root,
            user,
            ports,
            nodes=nodes,
            accounting=accounting,
            memory_limits=memory_limits,
            network=network,
            **sizes,
        )
        try:
            self._write_files(layout)
            if network:
                self._spawn(SWITCH, *devcluster_net.HOLD, own_network=True)
                devcluster_net.build_switch(network, self.pids()[SWITCH])
            self._start_munge(layout)
            if accounting:
                self._start_accounting(layout)
            self.start_controller()
            for name in layout.node_names:
                self.start_node(name)
            self.wait_idle(layout.node_names)
        except BaseException:
            self.down(keep=True)
            raise
        return layout

    @property
    def node_addresses(self) -> dict[str, str]:
        """Name → address of every node."""
        return dict(re.findall(r"^NodeName=(\S+) .*NodeAddr=(\S+) ", self.conf.read_text(), re.MULTILINE))

    @property
    def node_names(self) -> list[str]:
        """The nodes, in order."""
        return list(self.node_addresses)

    @property
    def network(self) -> str | None:
        """The nodes' own network, as Layout has it."""
        (head,) = re.findall(r"^SlurmctldHost=localhost\((\S+)\.1\)", self.conf.read_text(), re.MULTILINE)
        return None if head == "127.0.0" else str(head)

    def _write_files(self, layout: Layout) -> None:
        for name in ("munge", "state", "spool", "log", "run", "gpu"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        self.root.chmod(0o755)
        (self.root / "munge").chmod(0o755)
        key = self.root / "munge" / "key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))
        for index in range(layout.gpus):
            (self.root / "gpu" / f"fake{index}").symlink_to(os.devnull)
        self.conf.write_text(slurm_conf(layout))
        (self.root / "gres.conf").write_text(gres_conf(layout) if layout.gpus else "")
        (self.root / "cgroup.conf").write_text(cgroup_conf(layout))

    def pids(self) -> dict[str, int]:
        """The daemons that were started, by name."""
        return json.loads(self.pid_file.read_text()) if self.pid_file.exists() else {}

    def running(self) -> dict[str, int]:
        """The daemons that live and are this cluster's."""
        return {name: pid for name, pid in self.pids().items() if alive(pid) and self._ours(pid)}

    def _ours(self, pid: int) -> bool:
        return f"SLURM_CONF={self.conf}\0".encode() in _environ(pid)

    def _spawn(self, name: str, *argv: str, own_network: bool = False, **variables: str) -> None:
        env = {**os.environ, **self.environment, **variables}

        def prepare() -> None:
            if self.tied:
                die_with_parent()
            if own_network:
                devcluster_net.enter_namespace()

        with (self.root / "log" / f"{name}.out").open("ab") as log:
            process = subprocess.Popen(
                argv,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=prepare,
            )
        _children.append(process)
        self.pid_file.write_text(json.dumps({**self.pids(), name: process.pid}))

    def _wait(self, what: str, ready: Callable[[], bool], timeout_s: float = 30.0) -> None:
        end = time.monotonic() + timeout_s
        while not ready():
            for name, pid in self.pids().items():
                if not alive(pid):
                    log = self.root / "log" / f"{name}.out"
                    raise UserError(f"{name} ended while it started: {log.read_text()[-300:].strip() or log}")
            if time.monotonic() > end:
                raise UserError(f"{what} not ready after {timeout_s:.0f} s; logs in {self.root / 'log'}")
            time.sleep(0.05)

    def _start_munge(self, layout: Layout) -> None:
        folder = layout.munge_socket.parent
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self._spawn("munged", "munged", "--foreground", *(f"--{key}={folder / name}" for key, name in files.items()))
        self._wait("munged", lambda: self.command("munge", "-n", "-S", str(layout.munge_socket)).returncode == 0)

    def _start_accounting(self, layout: Layout) -> None:
        data, database_socket = self.root / "mysql", self.root / "run" / "mysql"
        common = ("--no-defaults", f"--datadir={data}", f"--user={layout.user}")
        made = self.command("mariadb-install-db", *common, "--auth-root-authentication-method=normal", "--skip-test-db")
        if made.returncode:
            raise UserError(f"mariadb-install-db: {(made.stdout + made.stderr).strip()[-300:]}")
        self._spawn(
            "mariadbd",
            "mariadbd",
            *common,
            f"--socket={database_socket}",
            f"--pid-file={self.root}/run/mysql.pid",
            "--bind-address=127.0.0.1",
            f"--port={layout.ports[2]}",
            "--innodb-buffer-pool-size=64M",
            "--innodb-lock-wait-timeout=900",
            "--innodb-flush-log-at-trx-commit=0",
        )
        password = secrets.token_hex(16)
        conf = self.root / "slurmdbd.conf"
        conf.touch(0o600)
        conf.write_text(slurmdbd_conf(layout, password))
        sql = "CREATE DATABASE IF NOT EXISTS slurm_acct_db;"
        for host in ("%", "localhost"):
            sql += f"CREATE USER IF NOT EXISTS 'slurm'@'{host}' IDENTIFIED BY '{password}';"
            sql += f"GRANT ALL ON slurm_acct_db.* TO 'slurm'@'{host}';"
        client = ("mariadb", "--no-defaults", f"--socket={database_socket}", "-uroot")

        def prepared() -> bool:
            env = {**os.environ, **self.environment}
            return subprocess.run(client, env=env, input=sql, text=True, capture_output=True).returncode == 0

        self._wait("MariaDB", prepared)
        self.start_slurmdbd()
        add = ("sacctmgr", "-i", "add", "cluster", "dev")
        self._wait("slurmdbd", lambda: self.command(*add).returncode == 0)
        for entity in (
            ("account", ACCOUNT, "Cluster=dev", "Description=test", "Organization=test"),
            ("user", layout.user, f"Account={ACCOUNT}", f"DefaultAccount={ACCOUNT}", "Cluster=dev"),
        ):
            done = self.command("sacctmgr", "-i", "add", *entity)
            if done.returncode and "Nothing new added" not in done.stdout:
                raise UserError(f"sacctmgr add {entity[0]}: {(done.stdout + done.stderr).strip()[-300:]}")

    def start_slurmdbd(self) -> None:
        """Start slurmdbd; what slurmctld kept for it meanwhile reaches it."""
        self._spawn("slurmdbd", "slurmdbd", "-D")

    def start_controller(self) -> None:
        """Start slurmctld; it continues from its saved state."""
        self._spawn("slurmctld", "slurmctld", "-D")

    def start_node(self, name: str, hidden: Path | None = None) -> None:
        """Start a virtual node. ``hidden``: a folder that this node does not see, as if not shared (root only)."""
        argv: tuple[str, ...] = ("slurmd", "-D", "-N", name)
        if hidden is not None:
            hide = f'mount -t tmpfs none "{hidden}" && exec "$@"'
            argv = ("unshare", "--mount", "--propagation=private", "sh", "-c", hide, "sh", *argv)
        network = self.network
        if not network:
            self._spawn(f"slurmd.{name}", *argv, VCPPO_NODE=name)
            return
        waiting = ("sh", "-c", devcluster_net.READY, "sh", *argv)
        self._spawn(f"slurmd.{name}", *waiting, own_network=True, VCPPO_NODE=name)
        pids = self.pids()
        number = FIRST_NODE + self.node_names.index(name)
        devcluster_net.plug_in(network, number, pids[SWITCH], pids[f"slurmd.{name}"])

    def wait_idle(self, names: list[str], timeout_s: float = 30.0) -> None:
        """Wait until these nodes are idle."""

        def idle() -> bool:
            lines = self.command("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T").stdout.splitlines()
            states = dict(line.split() for line in lines)
            return all(states.get(name) == "idle" for name in names)

        self._wait(f"nodes {', '.join(names)}", idle, timeout_s)

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """Send a signal to a daemon and wait until it has gone."""
        pid = self.running().get(name)
        pids = self.pids()
        pids.pop(name, None)
        self.pid_file.write_text(json.dumps(pids))
        if pid is not None:
            os.kill(pid, number)
            _wait_gone([pid], 10)

    def cut_power(self, node: str) -> int:
        """SIGKILL a node's slurmd, its step daemons and everything they started; returns how many processes."""
        self.kill(f"slurmd.{node}")
        marks = [f"\0{name}={node}\0".encode() for name in ("VCPPO_NODE", "SLURMD_NODENAME")]
        ours = f"SLURM_CONF={self.conf}\0".encode()
        roots = [pid for pid in _all_pids() if ours in (env := _environ(pid)) and any(m in b"\0" + env for m in marks)]
        # Step daemons have a bare environment: they are known by what they started.
        return _kill_trees([*roots, *filter(_is_daemon, map(_parent, roots))])

    def down(self, keep: bool = False) -> None:
        """End jobs, daemons and strays of this cluster; remove its folder unless ``keep``."""
        running = self.running()
        if "slurmctld" in running and any(name.startswith("slurmd.") for name in running):
            self.command("scancel", "--full", "-u", pwd.getpwuid(os.getuid()).pw_name)
            end = time.monotonic() + 10
            while time.monotonic() < end and self.command("squeue", "-h").stdout.strip():
                time.sleep(0.1)
        order = ["slurmd.", "slurmctld", "slurmdbd", "mariadbd", "munged", SWITCH]
        for name in sorted(running, key=lambda name: next(n for n, head in enumerate(order) if name.startswith(head))):
            self.kill(name, signal.SIGTERM)
        ours = f"SLURM_CONF={self.conf}\0".encode()
        daemons = [pid for pid in _all_pids() if _is_daemon(pid) and ours in _environ(pid)]
        _kill_trees(daemons)
        if self.conf.exists():
            for node in self.node_names:
                _remove_empty(memory_cgroup(node))
        if not keep:
            shutil.rmtree(self.root, ignore_errors=True)


def memory_limits_possible() -> bool:
    """True for root where the kernel's memory groups are of version 1 and may be written."""
    return os.getuid() == 0 and os.access(CGROUPS / "memory" / "memory.limit_in_bytes", os.W_OK)


def _remove_empty(group: Path) -> None:
    """Remove a group and those below it that hold no process."""
    for folder, _, _ in os.walk(group, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(folder)


def _all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]


def _environ(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes() + b"\0"
    except OSError:
        return b""


def _is_daemon(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text().startswith(("slurm", "munged", "mariadbd", "sleep"))
    except OSError:
        return False


def _wait_gone(pids: list[int], timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while any(alive(pid) for pid in pids):
        if time.monotonic() > end:
            for pid in pids:
                if alive(pid):
                    os.kill(pid, signal.SIGKILL)
            end = time.monotonic() + 5
        for child in _children:
            child.poll()
        time.sleep(0.02)


def _parent(pid: int) -> int:
    """The process that started another one; 0 if that has gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _kill_trees(roots: list[int]) -> int:
    """SIGKILL processes and all below them.

    All are stopped first, as by a power cut: a step daemon that lives a moment longer would report its job as failed.
    """
    pids = {pid for root in roots for pid in (root, *descendants(root))} - {os.getpid()}
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
    return len(pids)


def main() -> int:
    """tools/devcluster.sh up|down|status."""
    parser = argparse.ArgumentParser(prog="tools/devcluster.sh", description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("up", "down", "status"))
    parser.add_argument(
        "--root", type=Path, default=DEFAULT_ROOT, help="the cluster's own folder (default: %(default)s)"
    )
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--gpus", type=int, default=2, help="fake GPUs per node")
    parser.add_argument("--accounting", action="store_true", help=f"slurmdbd and MariaDB: sacct, and account {ACCOUNT}")
    args = parser.parse_args()
    cluster = DevCluster(args.root)
    started = time.monotonic()
    try:
        if args.action == "up":
            cluster.up(args.nodes, args.accounting, gpus=args.gpus)
            print(f"{args.nodes} nodes up in {time.monotonic() - started:.1f} s; use it with:", file=sys.stderr)
            print(f"export SLURM_CONF={cluster.conf}")
        elif args.action == "down":
            cluster.down()
        else:
            running = cluster.running()
            print("\n".join(f"{name}: process {pid}" for name, pid in running.items()) or "not running")
            print(cluster.command("sinfo").stdout if running else "", end="")
            return DONE if running else FAILED
    except UserError as error:
        print(f"devcluster: {error}", file=sys.stderr)
        return USER_ERROR
    return DONE


if __name__ == "__main__":
    sys.exit(main())
