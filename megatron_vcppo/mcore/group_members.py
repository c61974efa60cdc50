"""The ranks of a group prove to each other, through the group itself, that they hold the run's secret (run/secret.py).

Every group of torch connects anew, to whoever comes in a rank's place. Under torchrun there is no secret, and no proof.
"""

import torch
import torch.distributed as dist

from megatron_vcppo.run.secret import own_secret, prove_members

NAMED_RANKS = 4


def prove_group(group: dist.ProcessGroup | None, name: str) -> None:
    """Collective over the group. UserError, with its name, if a member does not hold the secret.

    NCCL connects in this, its first operation.
    """
    secret = own_secret()
    if secret is None:
        return
    device = torch.device("cpu") if dist.get_backend(group) == "gloo" else torch.device("cuda")

    def gather(mine: bytes) -> list[bytes]:
        own = torch.frombuffer(bytearray(mine), dtype=torch.uint8).to(device)
        found = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(found, own, group)
        return [bytes(one.tolist()) for one in found]

    prove_members(gather, secret, name, dist.get_rank(group))


def prove_groups_within() -> None:
    """The same through every gloo group within the world that this rank is in; collective over the world.

    Not through those of NCCL: most that Megatron makes are never used, and would take memory of the device for good.
    """
    for group in list(dist.distributed_c10d._world.pg_map):  # in the order in which they were made, on every rank
        ranks = dist.get_process_group_ranks(group)
        if group is not dist.group.WORLD and len(ranks) > 1 and dist.get_backend(group) == "gloo":
            named = ", ".join(map(str, ranks[:NAMED_RANKS])) + (", …" if len(ranks) > NAMED_RANKS else "")
            prove_group(group, f"the trainer's group of ranks {named}")
