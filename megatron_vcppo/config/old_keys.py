"""Keys of earlier versions, which stored configurations and users' files may hold."""

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
