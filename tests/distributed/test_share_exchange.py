"""Tokens travel to the replica that works on them, and to no other: shares, minibatches, saved outputs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors.torch import save_file

from megatron_vcppo.config import ParallelConfig, PpoConfig
from megatron_vcppo.data.rollout_share import ExpertsFormat, ModelOutputs, RolloutShare, RoutedExperts
from megatron_vcppo.mcore import runtime
from megatron_vcppo.records import RolloutPart
from megatron_vcppo.stages.share_exchange import move, replica_of_each, share_out
from megatron_vcppo.stages.unfinished import Unfinished, UpdateUnderWay, identity_of_schema_1
from megatron_vcppo.stages.updates import UpdateMetrics
from tests.helpers.distributed import run_distributed_test
from tests.helpers.ppo_update import make_rollouts, share_of

ROLLOUTS = make_rollouts(num_prompts=12)
WHOLE = RolloutShare.whole(ROLLOUTS)
FIELD = torch.arange(float(WHOLE.num_tokens))
"""Of the whole batch: each response token's own number."""
LAYOUTS = {"dp2-tp2": (4, ParallelConfig(tp=2)), "dp3": (3, ParallelConfig()), "pp2": (2, ParallelConfig(pp=2))}


def rows_of(flat: torch.Tensor, lengths: list[int], rows: np.ndarray) -> torch.Tensor:
    parts = flat.split(lengths)
    return torch.cat([flat[:0], *(parts[row] for row in rows)])


def field_of(share: RolloutShare) -> torch.Tensor:
    return rows_of(FIELD, WHOLE.batch.lengths.tolist(), share.rows)


def assert_right(share: RolloutShare) -> None:
    """It has what the whole batch has in these rows."""
    assert share.batch.rows.tobytes() == WHOLE.batch.rows.tobytes(), "the same batch under every layout"
    lengths = WHOLE.batch.sequence_lengths.tolist()
    assert torch.equal(share.token_ids, rows_of(WHOLE.token_ids, lengths, share.rows))
    if len(share.rollout_logprobs):
        logprobs = rows_of(WHOLE.rollout_logprobs, WHOLE.batch.lengths.tolist(), share.rows)
        assert torch.equal(share.rollout_logprobs, logprobs)


def exchange_on_a_rank(parallel: ParallelConfig) -> tuple[int, list[int], list[int]]:
    runtime.start(parallel, seed=1, timeout_s=60)
    share = share_of(ROLLOUTS)
    assert_right(share)
    part = [17, 3, 9, 4, 22]
    replicas = replica_of_each(share.batch.sequence_lengths, runtime.current().dp_size, part)
    moved, fields = move(share, {"x": field_of(share)}, replicas)
    assert_right(moved)
    assert torch.equal(fields["x"], field_of(moved))
    few = share_out(RolloutPart.whole(ROLLOUTS[:1]) if runtime.current().rank == 0 else RolloutPart())
    assert len(few.batch) == 1 and len(few.rows) == int(few.replicas[0] == runtime.current().dp_rank)
    return runtime.current().dp_rank, share.rows.tolist(), moved.rows.tolist()


def test_every_rollout_is_on_one_replica_and_on_all_its_ranks() -> None:
    for world_size, parallel in LAYOUTS.values():
        ranks = run_distributed_test(exchange_on_a_rank, world_size, parallel)
        by_replica = {replica: (rows, moved) for replica, rows, moved in ranks}
        assert all((rows, moved) == by_replica[replica] for replica, rows, moved in ranks)
        assert sorted(row for rows, _ in by_replica.values() for row in rows) == list(range(24))
        assert sorted(row for _, moved in by_replica.values() for row in moved) == [3, 4, 9, 17, 22]
        loads = [WHOLE.batch.sequence_lengths[rows].sum() for rows, _ in by_replica.values()]
        assert max(loads) <= 1.05 * np.mean(loads)


def exchange_experts(parallel: ParallelConfig) -> int:
    runtime.start(parallel, seed=1, timeout_s=60)
    form, generator = ExpertsFormat(2, 2, 2), np.random.default_rng(3)
    rollouts = [
        replace(r, routed_experts=generator.bytes(8 * (len(r.prompt.token_ids) + len(r.response_ids) - 1)))
        for r in ROLLOUTS
    ]
    whole, lengths = RoutedExperts.of(rollouts, form).rows, WHOLE.batch.sequence_lengths.tolist()
    share = share_of(rollouts, form)
    replicas = replica_of_each(share.batch.sequence_lengths, runtime.current().dp_size, [17, 3, 9, 4, 22])
    for one in (share, move(share, {}, replicas)[0]):
        assert one.routed_experts is not None and one.routed_experts.format == form
        assert torch.equal(one.routed_experts.rows, rows_of(whole, lengths, one.rows))
    return len(share.rows)


def test_experts_travel_with_the_tokens() -> None:
    for name in ("dp2-tp2", "dp3"):
        assert min(run_distributed_test(exchange_experts, *LAYOUTS[name])) > 0


def save_and_read(folder: Path, number: int, writers: int, before: str) -> None:
    """Each replica saves its share's outputs; read back under another number of replicas."""
    runtime.start(ParallelConfig(), seed=1, timeout_s=60)
    current, share = runtime.current(), share_of(ROLLOUTS)
    config = PpoConfig()
    outputs = ModelOutputs(field_of(share), share.rollout_logprobs, values=-field_of(share))
    under_way = UpdateUnderWay(share, outputs, UpdateMetrics(), config, 3)
    if number == writers:
        save_file(under_way.tensors(), folder / f"{current.dp_rank}.safetensors")
        if current.is_main:
            (folder / "state.json").write_text(json.dumps(under_way.state_dict()))
        return
    state: dict[str, Any] = json.loads((folder / "state.json").read_text())
    files = tuple(folder / f"{k}.safetensors" for k in range(writers))
    group = {prompt_id: i for i, prompt_id in enumerate(dict.fromkeys(r.prompt.prompt_id for r in ROLLOUTS))}
    mine = [(i, r) for i, r in enumerate(ROLLOUTS) if group[r.prompt.prompt_id] % current.dp_size == current.dp_rank]
    for one in (state, {"identity": before, "report": state["report"]}):
        unfinished = Unfinished.from_checkpoint(one, files)
        assert unfinished.fits(RolloutPart.of(mine), share, config, 3)
        assert not unfinished.fits(RolloutPart.of(mine), share, replace(config, minibatches=7), 3)
        found = unfinished.outputs(share).by_name()
        assert found.keys() == outputs.by_name().keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in outputs.by_name().items())


def identity_before() -> str:
    """As the release before wrote it, from the whole batch."""
    config = PpoConfig()
    steps = (3, config.ppo_epochs, config.minibatches, config.critic.updates_per_actor_update)
    digest = xxhash.xxh3_128(repr((steps, config.critic_only_iterations)).encode())
    digest.update(repr([(r.prompt.prompt_id, r.sample_index, r.seed, r.reward) for r in ROLLOUTS]).encode())
    digest.update(WHOLE.batch.lengths.numpy().tobytes())
    (block,) = WHOLE.blocks()
    digest.update(block.pad(WHOLE.rollout_logprobs).numpy().tobytes())
    return digest.hexdigest()


def test_saved_outputs_are_read_by_another_number_of_replicas(tmp_path: Path) -> None:
    before = identity_before()
    for writers, readers in ((1, 2), (3, 2)):
        folder = tmp_path / str(writers)
        folder.mkdir()
        for number in (writers, readers):
            run_distributed_test(save_and_read, number, folder, number, writers, before)


def test_identity_of_schema_1_sees_other_rewards() -> None:
    def body() -> tuple[str, str]:
        runtime.start(ParallelConfig(), seed=1, timeout_s=60)
        others = [replace(ROLLOUTS[0], reward=0.5), *ROLLOUTS[1:]]
        share, config = share_of(ROLLOUTS), PpoConfig()
        first, second = (
            identity_of_schema_1(RolloutPart.whole(rollouts), share, config, 3) for rollouts in (ROLLOUTS, others)
        )
        return first, second

    ((same, other),) = run_distributed_test(body, 1)
    assert same == identity_before() != other
