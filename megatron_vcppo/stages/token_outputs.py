"""Model outputs for a whole batch of rollouts, computed by all replicas and known to every rank."""

from collections.abc import Callable, Sequence

from torch import Tensor

from megatron_vcppo.data.packing import PackedMicrobatch, unpack_all
from megatron_vcppo.data.rollout_batch import Packer, RolloutBatch
from megatron_vcppo.mcore import runtime


def token_outputs(
    batch: RolloutBatch, packing: Packer, run: Callable[[Sequence[PackedMicrobatch]], list[Tensor]]
) -> Tensor:
    """float32 [B, T]: log-probs or values of every response token; collective.

    run: ``Actor.logprobs`` or ``Critic.values``. Each replica works on its share, and rows are added over replicas:
    all but one have zeros there, so the sum is exact.
    """
    share = packing.share([len(r.prompt.token_ids) + len(r.response_ids) for r in batch.rollouts])
    microbatches = packing.pack(batch.sequences(share, {}))
    rows = unpack_all(microbatches, run(microbatches))
    return runtime.sum_over_replicas(batch.to_rows(rows, share))
