"""Which GPUs a node's engines take; no engine starts."""

import pytest

from megatron_vcppo.config import Config
from megatron_vcppo.errors import UserError
from megatron_vcppo.rollout import engine_command
from megatron_vcppo.rollout.node import engine_gpus, visible_gpus

UUIDS = [f"GPU-8f6{n}0c2e-1111-2222-3333-444455556666" for n in range(4)]
MIGS = [f"MIG-{n}c8a9bb2-1111-2222-3333-444455556666" for n in range(4)]


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        ("0,1, 2", ["0", "1", "2"]),
        (",".join(UUIDS), UUIDS),
        (",".join(MIGS), MIGS),
        ("", []),
        ("-1", []),
        ("0,-1,1", ["0"]),
        ("NoDevFiles", []),
    ],
)
def test_devices_keep_the_names_that_they_were_given(
    monkeypatch: pytest.MonkeyPatch, given: str, seen: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert visible_gpus() == seen


@pytest.mark.parametrize("names", [["4", "5", "6", "7"], UUIDS, MIGS])
def test_engines_on_trainer_nodes_take_the_last_gpus(
    monkeypatch: pytest.MonkeyPatch, names: list[str], tmp_path
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(names))
    config = Config()
    config.rollout.engine.per_node, config.cluster.rollout_nodes = 2, 0
    assert engine_gpus(config) == names[2:]
    placement = engine_command.Placement(tuple(engine_gpus(config)[1:]))
    variables = engine_command.environment({}, config.rollout.engine, placement, tmp_path / "secret", "10.0.0.1")
    assert variables["CUDA_VISIBLE_DEVICES"] == names[3] and variables["VLLM_HOST_IP"] == "10.0.0.1"
    for engines_on, rollout_nodes in (("trainer_gpus", 0), ("rollout_nodes", 1)):
        config.cluster.engines_on, config.cluster.rollout_nodes = engines_on, rollout_nodes  # type: ignore[assignment]
        assert engine_gpus(config) == names[:2]


def test_too_few_gpus_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    config = Config()
    config.rollout.engine.per_node, config.rollout.engine.tp = 2, 2
    with pytest.raises(UserError, match=r"2 engines × tp 2 × dp 1 need 4 GPUs; this node shows 3"):
        engine_gpus(config)
