"""The run's secret (run/secret.py) in requests to engines, each of which it must be in.

vLLM's own ``--api-key`` guards only part of its routes, and the unguarded ones run code for whoever reaches the port.
"""

import hmac


def bearer(secret: str) -> dict[str, str]:
    """The header that a request must carry."""
    return {"Authorization": f"Bearer {secret}"}


def is_authorized(headers: list[tuple[bytes, bytes]], secret: str) -> bool:
    """True if exactly one Authorization header is there and holds the secret; compared in constant time."""
    given = [value for name, value in headers if name.lower() == b"authorization"]
    return len(given) == 1 and hmac.compare_digest(given[0], f"Bearer {secret}".encode())
