"""Rules between keys: everything that can be decided from the configuration alone, without a file or a node.

A rule takes a Config whose values are in their ranges and yields one line per problem, with the keys, the numbers and
what to do. ``load_config`` runs all of them, so every command does. What is no reason to refuse a run is in notes.py,
what needs files in launch/checks.py.
"""

from collections.abc import Callable, Iterator

from megatron_vcppo.config.rules.layout import LAYOUT_RULES
from megatron_vcppo.config.rules.nodes import NODE_RULES, network
from megatron_vcppo.config.rules.slurm_options import SLURM_RULES
from megatron_vcppo.config.rules.stages import CHAIN_RULES
from megatron_vcppo.config.rules.stored_secrets import secrets
from megatron_vcppo.config.schema import Config

Rules = tuple[Callable[[Config], Iterator[str]], ...]

RULES: Rules = (*LAYOUT_RULES, *NODE_RULES, *SLURM_RULES, secrets, *CHAIN_RULES)
STAGE_RULES: Rules = (*LAYOUT_RULES, network, *SLURM_RULES)
"""Those about keys that a stage may have a value of its own for (``overrides``)."""
