"""What `vcppo doctor` makes of the probes' findings, and probes that need no cluster. On a cluster: test_nodes.py."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_vcppo.config import ClusterConfig
from megatron_vcppo.errors import UserError
from megatron_vcppo.slurm import doctor_findings
from megatron_vcppo.slurm.allreduce_probe import link_rate
from megatron_vcppo.slurm.software_probe import driver_version

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
    found = json.loads(done.stdout)
    assert found["node"] == "me" and set(found) == set(GOOD)
    if not driver_version():
        with pytest.raises(UserError, match=r"me: (torch there is built without CUDA|no NVIDIA driver)"):
            doctor_findings.driver([found])
