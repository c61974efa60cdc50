"""How a client and an engine show each other, with every request, that they hold the run's secret (run/secret.py).

The secret is never sent: whoever took an engine's port would have it. A request carries a random number and a code over
it, the request and the engine's address, which is good for that engine alone; the reply carries another code over the
same, without which its content is not read. vLLM's own ``--api-key`` is a secret that is sent, and guards only part of
its routes; the unguarded ones run code for whoever reaches the port.
"""

import hmac
import secrets
from dataclasses import dataclass, field

SCHEME = "VCPPO"
PROOF_HEADER = "VCPPO-Proof"


@dataclass(frozen=True)
class Call:
    """One request to an engine. Example: ``Call("GET", "/vcppo/status", "10.0.0.7:4711")``."""

    method: str
    path: str
    server: str
    """Address and port that the client calls, and that the server is called at."""
    number: str = field(default_factory=lambda: secrets.token_hex(16))

    def headers(self, secret: str) -> dict[str, str]:
        """What the request must carry."""
        return {"Authorization": f"{SCHEME} {self.number} {self._code(secret, 'request')}"}

    def proof(self, secret: str) -> str:
        """What the reply must carry, in PROOF_HEADER."""
        return self._code(secret, "reply")

    def is_proved(self, secret: str, proof: str) -> bool:
        """True if the reply that carries this proof comes from a holder of the secret; compared in constant time."""
        return hmac.compare_digest(proof.encode(), self.proof(secret).encode())

    def _code(self, secret: str, what: str) -> str:
        text = "|".join((what, self.method, self.path, self.server, self.number))
        return hmac.new(secret.encode(), text.encode(), "sha256").hexdigest()


def authorized_call(
    headers: list[tuple[bytes, bytes]], method: str, path: str, server: str, secret: str
) -> Call | None:
    """The call with these headers; None unless exactly one Authorization header is there and was made with the secret
    for this method, path and server."""
    given = [value for name, value in headers if name.lower() == b"authorization"]
    parts = given[0].split(b" ") if len(given) == 1 else []
    if len(parts) != 3 or len(parts[1]) != 32:
        return None
    call = Call(method, path, server, parts[1].decode("ascii", "replace"))
    expected = call.headers(secret)["Authorization"].encode()
    return call if hmac.compare_digest(given[0], expected) else None
