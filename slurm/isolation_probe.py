"""One task of `vcppo doctor` per node: which isolation of programs works there (rewards/sandbox/). One line."""

import sys

from megatron_vcppo.rewards.sandbox.isolation_choice import report
from megatron_vcppo.slurm.marked_lines import ANSWER


def main() -> int:
    """``python -m megatron_vcppo.slurm.isolation_probe``."""
    print(ANSWER + report(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
