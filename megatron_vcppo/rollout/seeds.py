"""Which responses are drawn: one seed per (run seed, iteration, prompt, sample), and what is safe in training."""

import hashlib
import logging

from megatron_vcppo.config.rollout import RolloutConfig
from megatron_vcppo.rollout.messages import Sampling

log = logging.getLogger(__name__)


def sample_seed(run_seed: int, iteration: int, prompt_id: str, sample_index: int) -> int:
    """A seed in [0, 2**31), the same on every machine and in every process."""
    key = f"{run_seed}\n{iteration}\n{prompt_id}\n{sample_index}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "big") >> 1


def training_sampling(config: RolloutConfig) -> Sampling:
    """The sampling of a training iteration; warns if log-probs will not be the policy's own."""
    cut = [
        f"{name} = {value}"
        for name, value, off in (("rollout.top_p", config.top_p, 1.0), ("rollout.top_k", config.top_k, 0))
        if value != off
    ]
    if cut:
        log.warning(
            f"{' and '.join(cut)}: responses are drawn from the cut distribution and their log-probs are renormalised "
            "over the kept tokens, so they are higher than the policy's own (by 0.1 to 1.4 per token in measurements) "
            "and PPO's ratio is biased. Set top_p to 1 and top_k to 0 in training."
        )
    return Sampling(config.temperature, config.top_p, config.top_k, list(config.stop), config.ignore_eos)
