"""The chains of an experiment as real processes of tiny stages: shared once, continued, one failure at a time."""

import os
import signal
from pathlib import Path

from megatron_vcppo.commands.experiment import Chain, start_all
from megatron_vcppo.errors import DONE, SAVED
from megatron_vcppo.launch import local_chain
from megatron_vcppo.launch.chains_at_once import remaining
from megatron_vcppo.launch.local_chain import stop_requests
from megatron_vcppo.run.folder import RunFolder
from tools.benchmarks._tiny_chains import TINY, result, tiny_config, write_config


def chains_of(root: Path, bad: str = "") -> list[Chain]:
    """A shared SFT, and two arms that export its model; ``bad`` names the run whose data are bad."""
    shared = RunFolder(root / "shared")
    chains = []
    for name in ("shared", "one", "two"):
        config = tiny_config(root / name, ("sft",) if name == "shared" else ("sft", "export"), ranks=1)
        if name == bad:
            config.sft.train = "bad"
        write_config(config)
        stages, base = (["sft"], None) if name == "shared" else (["export"], shared)
        chains.append(Chain(name, RunFolder(Path(config.run.dir)), config, stages, base))
    return chains


def test_shared_stages_run_once_and_a_failure_is_repeated_alone(tmp_path: Path, capsys) -> None:
    shared, one, two = chains = chains_of(tmp_path, bad="one")
    assert start_all(chains, TINY) == 2
    out = capsys.readouterr().out
    assert "3 chains, 0 of them done before" in out and "chain 2 of 3: one; " in out and " to go" in out
    assert not one.is_done() and two.is_done()
    for chain in (shared, two):
        assert result(chain.run)["trained"] == [1, 2, 3, 4, 5, 6], "SFT, trained or taken"
    one.config.sft.train = two.config.sft.train
    assert start_all(chains, TINY) == 0
    assert "3 chains, 2 of them done before" in capsys.readouterr().out
    assert [len(chain.run.stage("sft").attempts()) for chain in chains] == [1, 0, 0]
    assert [len(chain.run.stage("export").attempts()) for chain in (one, two)] == [2, 1]


def test_arms_wait_where_their_shared_stages_failed(tmp_path: Path, capsys) -> None:
    shared, one, _ = chains_of(tmp_path, bad="shared")
    assert start_all([shared, one], TINY) == 2
    assert "one: left out, because its shared stages failed" in capsys.readouterr().out
    assert not one.run.stage("sft").path.exists()


def test_a_request_to_stop_at_the_end_of_a_chain_starts_no_other(tmp_path: Path, monkeypatch) -> None:
    begun = []

    def run_chain(run: RunFolder, *_: object) -> int:
        begun.append(run.path.name)
        with stop_requests():
            os.kill(os.getpid(), signal.SIGINT)
        return DONE

    monkeypatch.setattr(local_chain, "run_chain", run_chain)
    assert start_all(chains_of(tmp_path)[:1] * 2, TINY) == SAVED
    assert begun == ["shared"]
    with stop_requests() as requests:
        assert requests == {"save": 0, "abort": 0}
        os.kill(os.getpid(), signal.SIGINT)
        with stop_requests() as inner:
            os.kill(os.getpid(), signal.SIGINT)
        assert requests == inner == {"save": 1, "abort": 1}


def test_the_time_to_go_follows_from_the_chains_before(monkeypatch) -> None:
    monkeypatch.setattr("time.monotonic", lambda: 1300.0)
    assert remaining(1000.0, 0, 4) == ""
    assert remaining(1000.0, 1, 4) == "; 5 min 0 s so far, about 15 min 0 s to go"
