"""Keys of earlier versions, which stored configurations and users' files may hold."""

import copy
from collections.abc import Mapping
from typing import Any

RENAMED = {
    "ppo.skip_limit": "run.skip_limit",
    "ppo.advantage.gamma": "returns.gamma",
    "ppo.advantage.overlong_penalty_tokens": "returns.overlong_penalty_tokens",
    "ppo.advantage.overlong_filter": "returns.overlong_filter",
    "ppo.critic.bounds": "values.bounds",
    "ppo.critic.huber_delta": "values.huber_delta",
}
"""Old name → new name; the value is taken."""
REMOVED: dict[str, tuple[tuple[Any, ...], str]] = {
    "rollout.interface": (("lo",), "engines use cluster.network_interface, as everything else does; remove this line"),
    "run.check_numerics": ((True, False), "PPO always checks; remove this line"),
}
"""Old name → the values that are ignored, because stored configurations hold them, and advice for any other value."""


def with_new_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """The nested values of a stored configuration under the present names, without removed keys."""
    renamed = copy.deepcopy(dict(values))
    for old in (*RENAMED, *REMOVED):
        *sections, key = old.split(".")
        holder: Any = renamed
        for section in sections:
            holder = holder.get(section) if isinstance(holder, dict) else None
        if not isinstance(holder, dict) or key not in holder:
            continue
        value = holder.pop(key)
        if old in RENAMED:
            section, name = RENAMED[old].split(".")
            renamed.setdefault(section, {}).setdefault(name, value)
    return renamed
