"""How a client and an engine show each other, with every request, that they hold the run's secret (run/secret.py).

The secret is never sent: whoever took an engine's port would have it. A request carries a random number, the digest of
its body and a code over both, the route and the engine's start, which is good once, for that engine alone; the reply
carries another code over the same, without which its content is not read. vLLM's own ``--api-key`` is a secret that is
sent, and guards only part of its routes; the unguarded ones run code for whoever reaches the port.
"""

import hashlib
import hmac
import secrets
from dataclasses import dataclass, field

SCHEME = "VCPPO"
PROOF_HEADER = "VCPPO-Proof"
PLACE_VARIABLE = "VCPPO_ENGINE_PLACE"
"""Names in an engine's environment which start of it this is (``rendezvous.Engine.place``)."""


@dataclass(frozen=True)
class Call:
    """One request to an engine. Example: ``Call("GET", "/vcppo/status", "10.0.0.7:4711, start 0")``."""

    method: str
    path: str
    """With the query, if there is one."""
    server: str
    """Which start of which engine the client means (``rendezvous.Engine.place``)."""
    digest: str = field(default_factory=lambda: digest_of(b""))
    """Of the body."""
    number: str = field(default_factory=lambda: secrets.token_hex(16))

    def headers(self, secret: str) -> dict[str, str]:
        """What the request must carry."""
        return {"Authorization": f"{SCHEME} {self.number} {self.digest} {self._code(secret, 'request')}"}

    def proof(self, secret: str) -> str:
        """What the reply must carry, in PROOF_HEADER."""
        return self._code(secret, "reply")

    def is_proved(self, secret: str, proof: str) -> bool:
        """True if the reply that carries this proof comes from a holder of the secret; compared in constant time."""
        return hmac.compare_digest(proof.encode(errors="replace"), self.proof(secret).encode())

    def _code(self, secret: str, what: str) -> str:
        text = "|".join((what, self.method, self.path, self.server, self.digest, self.number))
        return hmac.new(secret.encode(), text.encode(), "sha256").hexdigest()


def digest_of(body: bytes) -> str:
    """What stands for a body in the code, so that the code is checked before the body is read."""
    return hashlib.sha256(body).hexdigest()


def authorized_call(
    headers: list[tuple[bytes, bytes]], method: str, path: str, server: str, secret: str
) -> Call | None:
    """The call with these headers; None unless exactly one Authorization header is there and was made with the secret
    for this method, path and server. Whether the body has its digest, and the number is new, is for the caller."""
    given = [value for name, value in headers if name.lower() == b"authorization"]
    parts = given[0].split(b" ") if len(given) == 1 else []
    if [len(part) for part in parts[1:3]] != [32, 64] or len(parts) != 4:
        return None
    number, digest = (part.decode("ascii", "replace") for part in parts[1:3])
    call = Call(method, path, server, digest, number)
    expected = call.headers(secret)["Authorization"].encode()
    return call if hmac.compare_digest(given[0], expected) else None
