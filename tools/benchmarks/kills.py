"""Chains of tiny stages that survive SIGKILLs at random moments of random roles, here and on a real Slurm; a table.

Each kill is one line of JSON. A chain gets several kills, one after the other; whatever ends its controller is resumed
by the same command, until the chain is done. Then are compared: that it ended, that every iteration is in the final
state exactly once, that the final weights have the bits of an undisturbed chain, and what is left over: processes, and
files that an undisturbed chain does not leave. Who is killed when is drawn from --seed and the chain's number; which
processes live at that moment is the machine's.
"""

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from typing_extensions import override

from megatron_vcppo.config import Config
from megatron_vcppo.errors import SIGNALLED, UserError
from megatron_vcppo.report.text_table import text_table
from megatron_vcppo.run.files import append_json_line, parse_json, read_json_lines, write_json
from megatron_vcppo.run.folder import RunFolder
from megatron_vcppo.slurm.devcluster import DevCluster, missing_programs
from megatron_vcppo.slurm.submission import active_jobs, pending_stages, submit
from tools.benchmarks._tiny_chains import TINY, cluster_config, result, tiny_config, wait_until, write_config

STAGES = ("sft", "value_pretrain", "ppo")
STEPS = 16
ROLES = ("rank", "writer", "verifier", "supervisor", "engine", "controller", "preloaded", "guard")
"""writer: a rank at a moment in which its thread writes a checkpoint. The rest are processes of their own."""
PLACES = ("local", "slurm")
KILLS_PER_CHAIN = 5
CHAIN_S = {"local": 240.0, "slurm": 480.0}
"""Within which a chain must end, kills and all."""
MARK = "KILLS_RUN"
"""Variable of all roles of a chain, and of what they start, that holds its run folder."""
LEFT_S = 10.0
"""How long after a chain its processes may take to be gone."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--folder continues a series that was interrupted."""
    parser.add_argument("--count", type=int, default=200, help="kills (default: 200)")
    parser.add_argument("--minutes", type=float, default=60.0, help="no chain begins after that long (default: 60)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--places", nargs="*", choices=PLACES, default=PLACES, help="default: both, in turn")
    parser.add_argument("--folder", type=Path, help="of the chains and results; the same one again: continue there")


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One case per kill, then one per chain, then the summary, which is FOLDER/summary.json too."""
    folder: Path = (args.folder or Path(tempfile.mkdtemp(prefix="vcppo_kills_"))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)  # munge wants readable parents
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(SIGNALLED + signal.SIGTERM))  # what is left open is closed
    with _places(args.places, folder) as places:
        undisturbed = {name: _undisturbed(folder, place) for name, place in places.items()}
        end = time.monotonic() + 60 * args.minutes
        before = _read(folder)
        number = 1 + max((row["chain"] for row in before), default=0)
        kills = sum(row["kind"] == "kill" for row in before)
        while kills < args.count and time.monotonic() < end:
            name = [*places][number % len(places)]
            count = min(KILLS_PER_CHAIN, args.count - kills)
            chain = Chain(folder / f"chain_{number}", number, places[name], random.Random(f"{args.seed}.{number}"))
            for row in chain.suffer(count, undisturbed[name]):
                append_json_line(folder / "kills.jsonl", row)
                yield row
                kills += row["kind"] == "kill"
            number += 1
    found = _summary(_read(folder))
    write_json(folder / "summary.json", found)
    yield found
    print(_table(_read(folder)), file=sys.stderr)
    if found["chains"] != found["chains_good"]:
        sys.exit(f"not survived: see {folder}")
    if args.folder is None:
        shutil.rmtree(folder)


def _read(folder: Path) -> list[dict[str, Any]]:
    path = folder / "kills.jsonl"
    return read_json_lines(path) if path.exists() else []


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    kills, chains = ([row for row in rows if row["kind"] == kind] for kind in ("kill", "chain"))
    return {
        "kind": "summary",
        "kills": len(kills),
        "by_role": dict(Counter(row["role"] for row in kills)),
        "by_place": dict(Counter(row["place"] for row in kills)),
        "chains": len(chains),
        "chains_good": sum(row["good"] for row in chains),
        "ended": sum(row["ended"] for row in chains),
        "iterations_once": sum(row["iterations_once"] for row in chains),
        "bits_equal": sum(row["bits_equal"] for row in chains),
        "processes_left": sum(len(row["processes_left"]) for row in chains),
        "files_left": sum(len(row["files_left"]) for row in chains),
        "resumed": sum(row["resumed"] for row in chains),
    }


def _table(rows: list[dict[str, Any]]) -> str:
    kills = [row for row in rows if row["kind"] == "kill"]
    good = {row["chain"] for row in rows if row["kind"] == "chain" and row["good"]}
    lines = []
    for role in ROLES:
        of_role = [row for row in kills if row["role"] == role]
        line = {"killed": role, **{place: sum(row["place"] == place for row in of_role) for place in PLACES}}
        lines.append(line | {"in chains that ended well": sum(row["chain"] in good for row in of_role)})
    return text_table(lines, sys.stderr)


class Place(Protocol):
    """Where chains run."""

    name: str

    def config(self, folder: Path) -> Config:
        """A chain's."""

    def start(self, run: RunFolder, config: Config) -> None:
        """Begin or resume the chain."""

    def is_active(self, run: RunFolder) -> bool:
        """Whether its controller still works, or is to."""

    def end(self, run: RunFolder) -> None:
        """Stop what may still run."""


class Local(Place):
    """Chains as ``vcppo run`` has them on this machine."""

    name = "local"

    def __init__(self) -> None:
        self.controller: subprocess.Popen[bytes] | None = None

    @override
    def config(self, folder: Path) -> Config:
        return tiny_config(folder, STAGES, steps=STEPS)

    @override
    def start(self, run: RunFolder, config: Config) -> None:
        argv = (sys.executable, "-m", "tools.benchmarks._kill_chain", str(run.path))
        with (run.path.parent / f"{run.path.name}.log").open("ab") as log:
            env = os.environ | {MARK: str(run.path)}
            self.controller = subprocess.Popen(argv, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=env)

    @override
    def is_active(self, run: RunFolder) -> bool:
        return self.controller is not None and self.controller.poll() is None

    @override
    def end(self, run: RunFolder) -> None:
        if self.controller is not None and self.controller.poll() is None:
            self.controller.kill()
            self.controller.wait()


class Slurm(Place):
    """Chains as ``vcppo submit`` has them on the test cluster."""

    name = "slurm"

    def __init__(self, cluster: DevCluster) -> None:
        self.cluster = cluster
        self.known, self.asked_at = False, 0.0

    @override
    def config(self, folder: Path) -> Config:
        return cluster_config(folder, STAGES, steps=STEPS)

    @override
    def start(self, run: RunFolder, config: Config) -> None:
        submit(run, config, [*config.stages], TINY)
        self.known, self.asked_at = True, time.monotonic()

    @override
    def is_active(self, run: RunFolder) -> bool:
        if time.monotonic() - self.asked_at > 1:  # squeue costs a tenth of a second
            self.known, self.asked_at = bool(active_jobs(run)), time.monotonic()
        return self.known

    @override
    def end(self, run: RunFolder) -> None:
        self.cluster.command("scancel", *(state.job_id for state in active_jobs(run)))
        wait_until(lambda: not self.is_active(run), "the jobs to end", 60)


class _places:
    """The places by name; the cluster is up meanwhile."""

    def __init__(self, names: list[str], folder: Path) -> None:
        self.names, self.folder = names, folder
        self.cluster: DevCluster | None = None

    def __enter__(self) -> dict[str, Place]:
        places: dict[str, Place] = {}
        if "local" in self.names:
            places["local"] = Local()
        if "slurm" in self.names:
            if missing := missing_programs():
                raise UserError(f"not installed: {', '.join(missing)}; or use --places local")
            self.cluster = DevCluster(self.folder / "slurm", tied=True)
            self.cluster.up(nodes=3)
            os.environ.update(self.cluster.environment)
            places["slurm"] = Slurm(self.cluster)
        return places

    def __exit__(self, *_: object) -> None:
        if self.cluster is not None:
            self.cluster.down()


@dataclass(frozen=True)
class Undisturbed:
    """A chain that nobody was killed in."""

    weights: dict[str, bytes]
    """Of each stage at its end."""
    seconds: float
    files: frozenset[str]
    """Kinds of files that it left: names without numbers."""


def _undisturbed(folder: Path, place: Place) -> Undisturbed:
    chain = Chain(folder / f"undisturbed_{place.name}", 0, place, random.Random())
    known = folder / f"undisturbed_{place.name}.json"
    if not known.exists():
        shutil.rmtree(chain.run.path, ignore_errors=True)
        started = time.monotonic()
        chain.begin()
        wait_until(lambda: not place.is_active(chain.run), f"{chain.run.path}", CHAIN_S[place.name])
        assert chain.is_done(), f"an undisturbed chain did not end: {chain.run.path}"
        write_json(known, {"seconds": time.monotonic() - started})
    seconds = parse_json(known.read_bytes())["seconds"]
    return Undisturbed(chain.weights(), seconds, frozenset(chain.kinds_of_files()))


@dataclass
class Chain:
    """One chain and the kills in it."""

    folder: Path
    number: int
    place: Place
    draw: random.Random
    resumed: int = 0
    seen: dict[int, str] = field(default_factory=dict)
    """Processes that were this chain's at some time, by id, and when they began."""
    run: RunFolder = field(init=False)
    config: Config = field(init=False)

    def __post_init__(self) -> None:
        self.run = RunFolder(self.folder)

    def begin(self) -> None:
        """Write the configuration and start."""
        self.config = self.place.config(self.folder)
        self.config.cluster.crash_retries = KILLS_PER_CHAIN
        self.config.cluster.environment |= {
            "TINY_SECONDS": "0.1",
            "TINY_WRITE_SECONDS": "0.15",
            "TINY_VERIFIER": "1",
            MARK: str(self.folder),
        }
        write_config(self.config)
        self.place.start(self.run, self.config)

    def suffer(self, count: int, undisturbed: Undisturbed) -> Iterator[dict[str, Any]]:
        """A case per kill, then one for the chain."""
        shutil.rmtree(self.folder, ignore_errors=True)
        started, problem = time.monotonic(), ""
        end = started + CHAIN_S[self.place.name]
        kills = 0
        self.begin()
        try:
            due = time.monotonic() + self.draw.uniform(0, undisturbed.seconds / 3)
            role = self.draw.choice(ROLES)
            while not self.is_done():
                if time.monotonic() > end:
                    problem = f"not done after {CHAIN_S[self.place.name]:g} s"
                    break
                if not self.place.is_active(self.run) and not self.is_done():
                    self.resumed += 1
                    self.place.start(self.run, self.config)
                if kills < count and time.monotonic() >= due and (pid := self.victim(role)):
                    row = {"kind": "kill", "chain": self.number, "place": self.place.name, "role": role}
                    row |= {"stage": self.stage(), "at_s": round(time.monotonic() - started, 2)}
                    os.kill(pid, signal.SIGKILL)
                    kills += 1
                    yield row
                    due = time.monotonic() + self.draw.uniform(0.2, undisturbed.seconds / 3)
                    role = self.draw.choice(ROLES)
                elif time.monotonic() >= due + 3:  # nobody of this role lives in this stage
                    role = self.draw.choice(ROLES)
                    due = time.monotonic()
                time.sleep(0.05)
            wait_until(lambda: not self.place.is_active(self.run), "the controller to end", 60)
        except (AssertionError, UserError) as error:
            problem = str(error)
        except BaseException:
            self.place.end(self.run)
            raise
        yield self.judged(undisturbed, problem, time.monotonic() - started)

    def judged(self, undisturbed: Undisturbed, problem: str, seconds: float) -> dict[str, Any]:
        """How the chain ended."""
        if problem:
            self.place.end(self.run)
        ended = not problem and self.is_done()
        once = [*range(1, STEPS + 1)]
        trained = {"trained": once, "total": sum(once)}
        deadline = time.monotonic() + LEFT_S
        while (left := [*self.processes().values()]) and time.monotonic() < deadline:
            time.sleep(0.2)
        row = {
            "kind": "chain",
            "chain": self.number,
            "place": self.place.name,
            "ended": ended,
            "iterations_once": ended and all(result(self.run, stage) == trained for stage in STAGES),
            "bits_equal": ended and self.weights() == undisturbed.weights,
            "processes_left": left,
            "files_left": sorted(self.kinds_of_files() - undisturbed.files) if ended else [],
            "resumed": self.resumed,
            "seconds": round(seconds, 1),
            "problem": problem,
        }
        good = row["ended"] and row["iterations_once"] and row["bits_equal"] and not left and not row["files_left"]
        if good:
            shutil.rmtree(self.folder)
            (self.folder.parent / f"{self.folder.name}.log").unlink(missing_ok=True)
        return row | {"good": bool(good)}

    def is_done(self) -> bool:
        """Whether every stage's manifest verifies."""
        return not pending_stages(self.run, [*STAGES])

    def stage(self) -> str:
        """The one under way."""
        return next(iter(pending_stages(self.run, [*STAGES])), "")

    def weights(self) -> dict[str, bytes]:
        """Of each stage's last checkpoint."""
        newest = {stage: max((self.run.stage(stage).path / "checkpoints").glob("iter_*")) for stage in STAGES}
        return {stage: (folder / "weights.bin").read_bytes() for stage, folder in newest.items()}

    def kinds_of_files(self) -> set[str]:
        """Names of what is in the run folder, without numbers and hexadecimal digests."""
        found = (path.relative_to(self.folder) for path in self.folder.rglob("*"))
        names = {str(path) for path in found if path.parts[0] != "code"}
        return {re.sub(r"\d+", "N", re.sub(r"[0-9a-f]{8,}", "H", name)) for name in names}

    def processes(self) -> dict[int, str]:
        """Command lines of this chain's live processes by id: marked ones, what they start, what was seen before."""
        table = process_table()
        mark, jobs = f"{MARK}={self.folder}\0".encode(), str(self.run.slurm)
        own = {pid for pid, process in table.items() if jobs in process.line or has_variable(pid, mark)}
        while more := {pid for pid, process in table.items() if process.parent in own} - own:
            own |= more
        own |= {pid for pid, process in table.items() if process.begin == self.seen.get(pid)}
        own.discard(os.getpid())
        self.seen |= {pid: table[pid].begin for pid in own}
        return {pid: table[pid].line for pid in own}

    def victim(self, role: str) -> int | None:
        """A live process of this role, None if there is none just now."""
        if role == "writer" and not [*self.run.stage(self.stage()).path.glob("checkpoints/.*.tmp")]:
            return None
        lives = sorted(pid for pid, line in self.processes().items() if is_of_role(role, pid, line))
        return self.draw.choice(lives) if lives else None


@dataclass(frozen=True)
class Process:
    """A live process."""

    parent: int
    begin: str
    """When it began, in the kernel's ticks: with the id, a name for it."""
    line: str


def process_table() -> dict[int, Process]:
    """All live processes by id."""
    found = {}
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        try:
            state, parent, *rest = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
            line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if state != "Z":
            found[pid] = Process(int(parent), rest[17], line.strip())
    return found


def has_variable(pid: int, assignment: bytes) -> bool:
    """Whether a process was started with this variable; assignment ends with a NUL."""
    try:
        return b"\0" + assignment in b"\0" + Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False


PRELOADED = "megatron_vcppo.launch.preloaded"
"""Names the modules of roles; only chains on this machine have some."""
MARKS = {
    "rank": "_tiny_stage",
    "writer": "_tiny_stage",
    "verifier": "rewards.worker",
    "supervisor": "_tiny_rollout",
    "engine": "sleep 3600.",
    "controller": "_kill_chain",
    "preloaded": PRELOADED,
    "guard": "guard.py",
}
OTHERS = {"srun", "bash", "sh", "slurmstepd:"}
"""Programs whose command lines have those of roles in them."""


def is_of_role(role: str, pid: int, line: str) -> bool:
    """Whether a process of a chain has this role. Only rank 0 writes."""
    if not line or Path(line.split()[0]).name in OTHERS:
        return False
    if MARKS["guard"] in line:
        return role == "guard"
    if PRELOADED in line:
        return role == "preloaded"
    if role == "controller" and "submitit.core._submit" in line:
        return True
    return MARKS[role] in line and (role != "writer" or line.startswith("RANK=0 ") or has_variable(pid, b"RANK=0\0"))
