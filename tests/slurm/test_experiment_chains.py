"""The chains of an experiment as real processes of tiny stages: shared once, continued, one failure at a time."""

from pathlib import Path

from megatron_vcppo.commands.experiment import Chain, remaining, start_all
from megatron_vcppo.run.folder import RunFolder
from tools.benchmarks._tiny_chains import TINY, result, tiny_config, write_config


def chains_of(root: Path, bad: str = "") -> list[Chain]:
    """A shared SFT, and two arms that export its model; ``bad`` names the run whose data are bad."""
    shared = RunFolder(root / "shared" / "seed_0")
    chains = []
    for name in ("shared", "one", "two"):
        config = tiny_config(root / name / "seed_0", ("sft",) if name == "shared" else ("sft", "export"), ranks=1)
        if name == bad:
            config.sft.train = "bad"
        write_config(config)
        stages, base = (["sft"], None) if name == "shared" else (["export"], shared)
        chains.append(Chain(name, RunFolder(Path(config.run.dir)), config, stages, base))
    return chains


def test_shared_stages_run_once_and_a_second_call_continues(tmp_path: Path, capsys) -> None:
    shared, one, two = chains_of(tmp_path)
    assert start_all([shared, one], TINY) == 0
    out = capsys.readouterr().out
    assert "2 chains, 0 of them done before" in out and "chain 2 of 2: one; " in out and " to go" in out
    for chain in (shared, one):
        assert result(chain.run)["trained"] == [1, 2, 3, 4, 5, 6], "SFT, trained or taken"
    assert len(one.run.stage("sft").attempts()) == 0 and len(shared.run.stage("sft").attempts()) == 1
    assert start_all([shared, one, two], TINY) == 0
    assert "3 chains, 2 of them done before" in capsys.readouterr().out
    assert len(one.run.stage("export").attempts()) == 1 and two.is_done()


def test_a_failure_keeps_back_only_what_needs_it(tmp_path: Path, capsys) -> None:
    shared, one, two = chains_of(tmp_path, bad="one")
    assert start_all([shared, one, two], TINY) == 2
    assert not one.is_done() and two.is_done()
    broken, third, _ = chains_of(tmp_path / "other", bad="shared")
    assert start_all([broken, third], TINY) == 2
    assert "one: left out, because its shared stages failed" in capsys.readouterr().out
    assert not third.run.stage("sft").path.exists()


def test_the_time_to_go_follows_from_the_chains_before(monkeypatch) -> None:
    monkeypatch.setattr("time.monotonic", lambda: 1300.0)
    assert remaining(1000.0, 0, 4) == ""
    assert remaining(1000.0, 1, 4) == "; 5 min 0 s so far, about 15 min 0 s to go"
