"""Processes that die with their parent, and whether one lives."""

import os
import signal
import socket
import subprocess
import sys
import time

from megatron_vcppo.run.processes import alive, free_ports


def test_a_child_dies_with_its_parent() -> None:
    parent = (
        "import subprocess, sys, time\n"
        "from megatron_vcppo.run.processes import die_with_parent\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], preexec_fn=die_with_parent)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    child = int(process.stdout.readline())
    assert alive(child)
    process.send_signal(signal.SIGKILL)
    process.wait()
    end = time.monotonic() + 30
    while alive(child):
        assert time.monotonic() < end, "the child outlived its parent"
        time.sleep(0.01)


def test_a_zombie_is_not_alive() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not alive(process.pid)
    process.wait()
    assert alive(os.getpid())


def test_free_ports_differ_and_can_be_taken() -> None:
    ports = free_ports(5, "127.0.0.1")
    assert len(set(ports)) == 5
    for port in ports:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", port))


def test_a_full_disk_does_not_change_an_exit_code() -> None:
    code = "from megatron_vcppo.run.processes import leave; print('last words'); leave(75)"
    with open("/dev/full", "w") as full:
        env = {**os.environ, "PYTHONUNBUFFERED": ""}
        assert subprocess.run([sys.executable, "-c", code], env=env, stdout=full, timeout=60).returncode == 75
