"""Rules between keys: everything that can be decided from the configuration alone, without a file or a node.

A rule takes a Config whose values are in their ranges and yields one line per problem, with the keys, the numbers and
what to do. ``load_config`` runs all of them, so every command does. What is no reason to refuse a run is in notes.py,
what needs files in launch/checks.py.
"""

from collections.abc import Callable, Iterator

from megatron_vcppo.config.rules.layout import LAYOUT_RULES
from megatron_vcppo.config.rules.nodes import NODE_RULES
from megatron_vcppo.config.rules.stages import CHAIN_RULES
from megatron_vcppo.config.schema import Config

RULES: tuple[Callable[[Config], Iterator[str]], ...] = (*LAYOUT_RULES, *NODE_RULES, *CHAIN_RULES)
