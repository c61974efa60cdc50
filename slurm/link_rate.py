"""What the links of this node carry, as the kernel and the names of its GPUs tell it."""

import re
from pathlib import Path

SYS = Path("/sys/class")
NVLINK_GB_PER_S = {"B300": 900, "B200": 900, "H200": 450, "H100": 450, "H800": 200, "A100": 300, "A800": 200}
"""One direction, all NVLinks of a GPU of the SXM kind together; PCIe cards of these names have less."""


def link_rate(interface: str, gpu_name: str, sys: Path = SYS) -> tuple[float | None, str]:
    """GB/s of one direction and what they are of: all active InfiniBand (RoCE) ports, else the interface.

    A job on one node has the loopback interface: then the NVLinks of the GPU count. None if nothing is known.
    """
    if interface == "lo":
        known = next((name for name in NVLINK_GB_PER_S if name in gpu_name and "PCIe" not in gpu_name), None)
        return (NVLINK_GB_PER_S[known], f"NVLink of {gpu_name}") if known else (None, "")
    ports = [port for port in sys.glob("infiniband/*/ports/*") if "ACTIVE" in read(port / "state")]
    rates = [float(found[1]) for port in ports if (found := re.match(r"([\d.]+) Gb/sec", read(port / "rate")))]
    if rates:
        return sum(rates) / 8, f"{len(rates)} InfiniBand ports, {sum(rates):g} Gb/s together"
    speed = read(sys / "net" / interface / "speed")
    return (int(speed) / 8000, f"{interface}, {speed} Mb/s") if speed.isdigit() else (None, "")


def read(path: Path) -> str:
    """The text of a file of the kernel; empty if it has none (a link that is down gives an error)."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
