"""The seed of every random choice, as a function of ``run.seed``.

Nothing else in training draws random numbers, so these are all that an exact resume needs. The numbers are fixed: other
ones would change the data order of runs that exist.
"""

import hashlib

TRUNCATION = 17
MIXTURE = 23


def epoch_seed(run_seed: int, epoch: int) -> list[int]:
    """Of the permutation of an epoch's samples, for ``numpy.random.default_rng``."""
    return [run_seed, epoch]


def mixture_seed(run_seed: int, epoch: int, source: int) -> list[int]:
    """Of the part of a source with a fractional weight that an epoch has, for ``numpy.random.default_rng``."""
    return [run_seed, epoch, source, MIXTURE]


def fixed_policy_seed(run_seed: int) -> int:
    """Of the prompt order in stages that sample from a policy that stays as it is, so that it differs
    from the order in PPO."""
    return run_seed + 1


def truncation_seed(run_seed: int) -> list[int]:
    """Of which responses the reward model sees truncated, and where, for ``numpy.random.default_rng``."""
    return [run_seed, TRUNCATION]


def minibatch_seed(run_seed: int, iteration: int, ppo_epoch: int) -> int:
    """Of the partition of a batch into minibatches, for torch; distinct below 1,009 passes and 1,000,003 iterations."""
    return (run_seed * 1_000_003 + iteration) * 1_009 + ppo_epoch


def turn_seed(seed: int, turn: int) -> int:
    """Of a turn of a response with this seed; that of turn 0 is the response's own."""
    if turn == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}\n{turn}".encode(), digest_size=4).digest(), "big") >> 1


def sample_seed(run_seed: int, iteration: int, prompt_id: str, sample_index: int) -> int:
    """A seed in [0, 2**31), the same on every machine and in every process."""
    key = f"{run_seed}\n{iteration}\n{prompt_id}\n{sample_index}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "big") >> 1


def adapter_seed(run_seed: int, kind: str, layer: int, name: str) -> int:
    """Of the initial values of an adapter, for torch: of one Hugging Face layer in one decoder layer (from 1) of the
    actor or the critic."""
    digest = hashlib.blake2b(f"{run_seed}\n{kind}\n{layer}\n{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
