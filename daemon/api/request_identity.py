"""What tells that a request is an earlier one, sent again: its `Idempotency-Key`, and the digest of its body."""

from __future__ import annotations

import hashlib

import msgspec
from aiohttp import web

from daemon.api.errors import bad_request

KEY_HEADER = "Idempotency-Key"
BODY_DIGEST: web.RequestKey[bytes] = web.RequestKey("body_digest", bytes)
_MAX_KEY = 255  # characters


class Identity(msgspec.Struct, array_like=True, frozen=True):
    """`name`: digest of the client and its key. `body`: digest of the path and the body. 32 bytes each."""

    name: bytes
    body: bytes

    def home(self, frontends: int) -> int:
        """Return which of so many frontends answers all requests of this name."""
        return int.from_bytes(self.name[:8]) % frontends


def idempotency_key(http: web.Request) -> str:
    """Return the key that the client has sent; "" if it has sent none. Raises ApiError (400) for a bad one."""
    key = http.headers.get(KEY_HEADER, "")
    if len(key) > _MAX_KEY or not (key.isascii() and key.isprintable()):
        raise bad_request(f"`{KEY_HEADER}` must have at most {_MAX_KEY} printable ASCII characters.", KEY_HEADER)
    return key


def identity(client: str, key: str, body_digest: bytes = b"") -> Identity:
    return Identity(hashlib.sha256(f"{client}\0{key}".encode("utf-8", "surrogatepass")).digest(), body_digest)


def body_digest(path: str, body: bytes) -> bytes:
    """Return the digest of a request to a route with this path."""
    digest = hashlib.sha256(path.encode() + b"\0")
    digest.update(body)  # without the interpreter's lock if it is large
    return digest.digest()
