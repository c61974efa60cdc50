"""What `vcppo doctor` makes of the probes' findings, and probes that need no cluster. On a cluster: test_nodes.py."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_vcppo.config import ClusterConfig
from megatron_vcppo.errors import UserError
from megatron_vcppo.launch.role_commands import RoleCommands
from megatron_vcppo.slurm import doctor_findings
from megatron_vcppo.slurm.allreduce_probe import link_rate
from megatron_vcppo.slurm.doctor_checks import checks
from megatron_vcppo.slurm.marked_lines import ANSWER, FINDING, marked
from megatron_vcppo.slurm.software_probe import driver_version
from tools.benchmarks._tiny_chains import cluster_config

GOOD = {
    "node": "gpu1",
    "compiler": "/usr/bin/g++",
    "python_header": True,
    "driver": "580.65.06",
    "cuda": "13.0",
    "transformer_engine": "2.20.2",
    "transformer_engine_error": "",
}


def test_a_good_node_is_described() -> None:
    assert doctor_findings.driver([GOOD]) == "580.65.06, CUDA 13.0"
    assert doctor_findings.transformer_engine([GOOD, GOOD | {"node": "gpu2"}]) == "2.20.2 on 2 nodes"
    assert doctor_findings.compiler([GOOD]) == "/usr/bin/g++, Python.h"


@pytest.mark.parametrize(
    ("check", "change", "message"),
    [
        ("driver", {"driver": "550.54.15"}, "gpu2: driver 550.54.15; torch's CUDA 13.0 needs 580 or newer"),
        ("driver", {"driver": ""}, "gpu2: no NVIDIA driver answers"),
        ("driver", {"cuda": ""}, "gpu2: torch there is built without CUDA: install with tools/setup.sh gpu"),
        ("compiler", {"compiler": ""}, "gpu2: no C\\+\\+ compiler: install g\\+\\+"),
        ("compiler", {"python_header": False}, "gpu2: no Python.h: install the Python headers"),
        (
            "transformer_engine",
            {"transformer_engine": "", "transformer_engine_error": "OSError: libcudnn.so.9"},
            "gpu2: OSError: libcudnn.so.9: install it with tools/setup.sh gpu",
        ),
    ],
)
def test_a_node_that_lacks_something_is_named(check: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        getattr(doctor_findings, check)([GOOD, GOOD | {"node": "gpu2"} | change])


def tasks(rate: float, gpus: int = 8, **more: Any) -> list[dict[str, Any]]:
    task = {"gpus": gpus, "backend": "nccl", "interface": "ib0", "first_s": 2.5, "bus_gb_per_s": rate}
    task |= {"link_gb_per_s": 400.0, "links": "8 InfiniBand ports, 3200 Gb/s together"} | more
    return [task | {"node": f"gpu{rank // 8}", "rank": rank} for rank in range(16)]


def test_the_collective_is_compared_with_the_links() -> None:
    cluster = ClusterConfig(name="big", trainer_nodes=2, gpus_per_node=8)
    text = "nccl over 16 GPUs of 2 nodes on ib0: 350 GB/s of bus bandwidth, the links carry 400 (8 InfiniBand ports, "
    assert doctor_findings.collective(tasks(350), cluster) == f"{text}3200 Gb/s together), first in 2.5 s"
    with pytest.raises(UserError, match=r"11\.5 GB/s of bus bandwidth, the links carry 400 .*: under 30%; NCCL_DEBUG"):
        doctor_findings.collective([*tasks(350)[1:], *tasks(11.5)[:1]], cluster)
    with pytest.raises(UserError, match=r"gpu0: torch sees 1 GPUs, cluster\.gpus_per_node is 8"):
        doctor_findings.collective(tasks(350, gpus=1), cluster)
    cluster.link_gb_per_s = 30
    assert "the links carry 30 (cluster.link_gb_per_s)" in doctor_findings.collective(tasks(11.5), cluster)


def test_on_cpu_nothing_is_expected_of_the_links() -> None:
    cluster = ClusterConfig(name="small", trainer_nodes=2)
    text = doctor_findings.collective(tasks(0.1, gpus=0, backend="gloo", interface="eth0"), cluster)
    assert text == "gloo over 2 nodes on eth0: 0.1 GB/s of bus bandwidth, first in 2.5 s"


def test_the_links_rate_is_read_from_the_kernel(tmp_path: Path) -> None:
    for number, state in enumerate(("4: ACTIVE", "4: ACTIVE", "1: DOWN")):
        port = tmp_path / "infiniband" / f"mlx5_{number}" / "ports" / "1"
        port.mkdir(parents=True)
        (port / "state").write_text(f"{state}\n")
        (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    assert link_rate("ib0", "NVIDIA H100 80GB HBM3", tmp_path) == (100.0, "2 InfiniBand ports, 800 Gb/s together")
    (tmp_path / "net" / "eth0").mkdir(parents=True)
    (tmp_path / "net" / "eth0" / "speed").write_text("25000\n")
    (tmp_path / "infiniband").rename(tmp_path / "gone")
    assert link_rate("eth0", "", tmp_path) == (3.125, "eth0, 25000 Mb/s")
    assert link_rate("eth1", "", tmp_path) == (None, "")
    assert link_rate("lo", "NVIDIA H100 80GB HBM3", tmp_path) == (450, "NVLink of NVIDIA H100 80GB HBM3")
    assert link_rate("lo", "NVIDIA H100 PCIe", tmp_path) == (None, "")


def test_the_software_probe_says_what_this_machine_has() -> None:
    argv = [sys.executable, "-m", "megatron_vcppo.slurm.software_probe"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, env=os.environ | {"SLURMD_NODENAME": "me"})
    (found,) = doctor_findings.records(marked(done.stdout, ANSWER), tasks=1)
    assert found["node"] == "me" and set(found) == set(GOOD)
    if not driver_version():
        with pytest.raises(UserError, match=r"me: (torch there is built without CUDA|no NVIDIA driver)"):
            doctor_findings.driver([found])


PROLOG = "echo '{ welcome }'; echo 'quota: 80 %'; printf 'loading modules ... '"
"""Of a site: text, a line that begins as JSON does, one without an end."""
CHECKS = ("file system, Python, network", "collective", "engine", "isolation of programs (rewards.code)")
"""Those that run something on the nodes."""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run one of the doctor's checks where srun is a site's: it prints, and keeps its arguments and environment."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def check(name: str, answers: list[str], code: int = 0, **keys: Any) -> str:
        (tmp_path / "answers").write_text("".join(f"{line}\n" for line in answers))
        keep = f'printf "%s\\n" "$@" > {tmp_path}/argv; env > {tmp_path}/env'
        (tmp_path / "srun").write_text(f"#!/bin/sh\n{keep}\n{PROLOG}\ncat {tmp_path}/answers\nexit {code}\n")
        (tmp_path / "srun").chmod(0o755)
        config = cluster_config(tmp_path / "run", ("sft",))
        vars(config.cluster).update(trainer_nodes=1, rollout_nodes=0, **keys)
        return dict(checks(config, RoleCommands(), tmp_path))[name]()

    return check


def test_what_a_prolog_prints_is_no_finding(site: Callable[..., str]) -> None:
    assert site(CHECKS[0], [f"{ANSWER}n1", "bye"]).startswith("all 1 see ")
    task = {"node": "n1", "gpus": 0, "backend": "gloo", "interface": "lo", "first_s": 1, "bus_gb_per_s": 0}
    assert site(CHECKS[1], [ANSWER + json.dumps(task | {"link_gb_per_s": None, "links": ""})]).startswith("gloo over 1")
    assert "after 5 s on n1" in site(CHECKS[2], [ANSWER + json.dumps({"node": "n1", "seconds": 5})])
    assert site(CHECKS[3], [f"{ANSWER}n1: landlock"]) == "n1: landlock"
    with pytest.raises(UserError, match=r"^n1: lacks torch$"):
        site(CHECKS[2], [f"{FINDING}n1: lacks torch"], code=3)


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("answers", [[], ["{}"]])
def test_a_probe_that_printed_nothing_is_named(site: Callable[..., str], name: str, answers: list[str]) -> None:
    with pytest.raises(UserError, match=r"^0 of 1 tasks of the test job printed what they found: do a prolog"):
        site(name, answers)


def test_a_cut_record_counts_as_none() -> None:
    with pytest.raises(UserError, match="1 of 2 tasks"):
        doctor_findings.records(['{"node": "a"}', '{"node": '], tasks=2)


def test_a_test_job_requests_what_the_real_ones_do(
    site: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_CPU_BIND", "SBATCH_EXPORT", "SRUN_DEBUG"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SBATCH_QOS", "night")
    monkeypatch.setenv("SBATCH_ACCOUNT", "another")
    asked = {"exclusive": "true", "mem-per-cpu": "8G", "licenses": "fs:1", "constraint": "ib", "comment": "a b"}
    batch_only = {"mail-user": "me@example.org", "output": "/tmp/x", "dependency": "afterok:1", "export": "NONE"}
    keys = {"account": "chem", "wckey": "key", "gpus_per_node": 4, "memory_per_node_gb": None}
    site(CHECKS[3], [f"{ANSWER}n1: landlock"], sbatch=asked | batch_only, **keys)
    argv = (tmp_path / "argv").read_text().splitlines()
    options = argv[: argv.index("-m")]
    wanted = ("mem-per-cpu=8G", "licenses=fs:1", "constraint=ib", "comment=a b", "account=chem", "wckey=key")
    assert {f"--{name}" for name in (*wanted, "exclusive", "qos=night", "gpus-per-node=4", "nodes=1")} <= set(options)
    assert not [option for option in options if option[2:].partition("=")[0] in batch_only]
    names = [option.partition("=")[0] for option in options]
    assert len(names) == len(set(names))
    variables = {line.partition("=")[0] for line in (tmp_path / "env").read_text().splitlines()}
    assert not {"SLURM_JOB_ID", "SLURM_CPU_BIND", "SBATCH_EXPORT", "SRUN_DEBUG"} & variables
