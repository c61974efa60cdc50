"""The run's secret: made once, private, compared whole; and what an engine is started with."""

import asyncio
import http.server
import os
import stat
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest

from megatron_vcppo.config import EngineConfig
from megatron_vcppo.errors import UserError
from megatron_vcppo.rollout import engine_command, engine_http
from megatron_vcppo.rollout.auth import PROOF_HEADER, Call, authorized_call, digest_of
from megatron_vcppo.rollout.rendezvous import Engine
from megatron_vcppo.rollout.supervisor import probe
from megatron_vcppo.run.processes import without_trainer
from megatron_vcppo.run.secret import make_secret, read_secret


def command(model: Path, on_gpu: bool = False, sleeps: bool = False, returns_experts: bool = False) -> list[str]:
    return engine_command.command(
        model,
        EngineConfig(),
        dtype="float32",
        max_length=512,
        address="127.0.0.1",
        port=1,
        on_gpu=on_gpu,
        seed=0,
        sleeps=sleeps,
        returns_experts=returns_experts,
    )


def test_the_first_process_makes_the_secret_and_all_read_the_same(tmp_path) -> None:
    path = tmp_path / "rendezvous" / "secret"
    code = "import sys, pathlib; from megatron_vcppo.run.secret import make_secret, read_secret\n"
    code += "path = pathlib.Path(sys.argv[1]); make_secret(path); print(read_secret(path))"
    makers = [
        subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) for _ in range(6)
    ]
    seen = {maker.communicate(timeout=60)[0] for maker in makers}
    assert len(seen) == 1 and len(seen.pop().strip()) >= 40
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(path.parent.iterdir()) == [path]


def test_a_secret_that_others_can_read_is_refused(tmp_path) -> None:
    make_secret(tmp_path / "secret")
    (tmp_path / "secret").chmod(0o640)
    with pytest.raises(UserError, match="readable by others"):
        read_secret(tmp_path / "secret")


CALL = Call("GET", "/version", "10.0.0.1:80, start 0 of engine_0_0")
GOOD = CALL.headers("abc")["Authorization"].encode()


def authorized(*headers: tuple[bytes, bytes], call: Call = CALL) -> bool:
    return authorized_call(list(headers), call.method, call.path, call.server, "abc") is not None


def test_a_request_opens_one_route_of_one_engine() -> None:
    assert authorized((b"authorization", GOOD)) and authorized((b"Authorization", GOOD))
    for change in (
        {"method": "POST"},
        {"path": "/"},
        {"path": "/version?a=1"},
        {"server": CALL.server.replace("80", "81")},
        {"server": CALL.server.replace("start 0", "start 1")},
    ):
        assert not authorized((b"authorization", GOOD), call=replace(CALL, **change))


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [b""],
        [b"abc"],
        [b"Bearer abc"],
        [GOOD[:-1]],
        [GOOD + b"0"],
        [GOOD.lower()],
        [GOOD, GOOD],
        [CALL.headers("ab")["Authorization"].encode()],
        [GOOD.replace(CALL.number.encode(), b"0" * 32)],
        [GOOD.replace(CALL.digest.encode(), digest_of(b"another body").encode())],
        [b"VCPPO " + b"\xff" * 32 + b" " + b"0" * 64 + b" " + b"0" * 64],
    ],
)
def test_only_the_whole_secret_opens(headers: list[bytes]) -> None:
    assert not authorized(*((b"authorization", value) for value in headers))
    assert not authorized((b"x-authorization", GOOD))


class Stranger(http.server.BaseHTTPRequestHandler):
    """Took an engine's port: answers well, with what it can copy of the request, and keeps what it is told."""

    heard: ClassVar[list[str]] = []
    status: ClassVar[int] = 200
    proof: ClassVar[str] = ""

    def do_GET(self) -> None:
        self.heard.append(f"{self.requestline} {self.headers}")
        self.send_response(self.status)
        self.send_header(PROOF_HEADER, self.proof or self.headers["Authorization"].split()[-1])
        if self.status == 307:
            self.send_header("Location", f"http://{self.headers['Host']}/elsewhere")
        self.end_headers()
        self.wfile.write(b'{"state": "serving", "policy_version": 0, "running": 0, "num_workers": 1}')

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("status", "proof"), [(200, ""), (200, "\xff" * 64), (307, "")], ids=["copies", "not ASCII", "redirects"]
)
def test_who_takes_an_engines_port_is_no_engine_and_learns_no_secret(
    status: int, proof: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"heard": [], "status": status, "proof": proof}.items():
        monkeypatch.setattr(Stranger, name, value)
    server = http.server.HTTPServer(("127.0.0.1", 0), Stranger)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    engine, secret = Engine(0, 0, 0, "127.0.0.1", server.server_port, 1), "a-secret-of-the-run"

    async def ask() -> None:
        async with engine_http.open_session(secret) as session:
            await engine_http.status(session, engine, 10.0)

    try:
        assert probe(engine, secret) == 0
        with pytest.raises(engine_http.FAILURES, match="does not hold the run's secret"):
            asyncio.run(ask())
    finally:
        server.shutdown()
        server.server_close()
    assert len(Stranger.heard) == 2 and not any(secret in text or "elsewhere" in text for text in Stranger.heard)


def test_an_engine_is_not_told_that_it_is_a_rank(tmp_path) -> None:
    trainer = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1",
               "SLURM_PROCID": "1", "SLURM_NTASKS": "4", "TORCHELASTIC_RUN_ID": "x",
               "OMP_NUM_THREADS": "1"}  # fmt: skip
    kept = {"PATH": "/bin", "HOME": "/root", "CUDA_HOME": "/cuda"}
    assert without_trainer({**trainer, **kept}) == kept
    variables = engine_command.environment(
        {**trainer, **kept}, EngineConfig(), engine_command.Placement(cpus=(0, 1)), tmp_path / "s", "127.0.0.1"
    )
    assert not set(trainer) - {"OMP_NUM_THREADS"} & set(variables)
    assert variables["OMP_NUM_THREADS"] != trainer["OMP_NUM_THREADS"]


def test_the_secret_is_on_no_command_line(tmp_path) -> None:
    make_secret(tmp_path / "secret")
    arguments = command(tmp_path)
    variables = engine_command.environment(
        os.environ, EngineConfig(), engine_command.Placement(), tmp_path / "secret", "127.0.0.1"
    )
    secret = read_secret(tmp_path / "secret")
    assert secret not in " ".join(arguments) and secret not in variables.values()


def test_development_routes_stay_off(tmp_path) -> None:
    variables = engine_command.environment(
        {}, EngineConfig(), engine_command.Placement(), tmp_path / "secret", "127.0.0.1"
    )
    assert "VLLM_SERVER_DEV_MODE" not in variables


def test_workers_share_the_cpus_of_their_engine() -> None:
    assert engine_command.bind((0, 1), 2) == "0|1"
    assert engine_command.bind((4, 5, 6, 7), 2) == "4,6|5,7"
    assert engine_command.bind((3,), 2) == "3|3"


@pytest.mark.parametrize(("on_gpu", "sleeps"), [(False, False), (False, True), (True, False), (True, True)])
def test_sleep_is_switched_on_where_vllm_has_it(tmp_path, on_gpu: bool, sleeps: bool) -> None:
    """On CPU vLLM refuses the option, and its engines can be told to sleep without it."""
    arguments = command(tmp_path, on_gpu, sleeps)
    assert ("--enable-sleep-mode" in arguments) == (on_gpu and sleeps)


def test_engines_that_return_experts_do_so_as_vllm_can_on_their_device(tmp_path: Path) -> None:
    on_gpu, on_cpu = command(tmp_path, True, returns_experts=True), command(tmp_path, returns_experts=True)
    assert "--enable-return-routed-experts" in on_gpu and "--no-enable-prefix-caching" not in on_gpu
    assert "--enable-return-routed-experts" not in on_cpu and "--no-enable-prefix-caching" in on_cpu
    scheduler = on_cpu[on_cpu.index("--scheduler-cls") + 1]
    assert scheduler.endswith("routed_experts.CapturingScheduler")
    assert not {"--worker-cls", "--enable-return-routed-experts"} & {*command(tmp_path), *command(tmp_path, True)}
