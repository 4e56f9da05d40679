"""API keys. Every route needs a key unless the route table makes it public, so no new route is public by mistake."""

from __future__ import annotations

from collections.abc import Iterable
from contextvars import ContextVar
from typing import Protocol

from daemon.api.errors import unauthorized
from daemon.api.key_file import digest
from daemon.ipc.keys_page import Key, KeysReader

# The key of the current request. One asyncio task serves all requests of a connection, so set it for every request.
current_key: ContextVar[Key | None] = ContextVar("current_key", default=None)


def client_name(key: Key | None, address: str | None) -> str:
    """Return a name of the client that a request counts for: its tenant, else its key, without keys its address.

    The name is empty, which tells it from no other, for an address of this machine: a proxy for many may run here.
    """
    if key is not None:
        return f"tenant {key.tenant}" if key.tenant else f"key {key.digest.hex()}"
    address = (address or "").removeprefix("::ffff:")  # an IPv4 client of a socket that listens on IPv6
    if not address or address.startswith("127.") or address == "::1":
        return ""
    return f"address {address}"


class Keys(Protocol):
    """The accepted keys."""

    def check(self, authorization: str | None) -> Key:
        """Return the key in this ``Authorization`` header. Raises ApiError (401) if it is not accepted."""
        ...


class KeyRing:
    """A fixed set of keys. Implements `Keys`."""

    def __init__(self, keys: Iterable[Key]) -> None:
        self._keys = {key.digest: key for key in keys}

    def check(self, authorization: str | None) -> Key:
        """Return the key in this ``Authorization`` header. Raises ApiError (401) if it is not in the ring."""
        if not authorization:
            raise unauthorized("You didn't provide an API key: send it as `Authorization: Bearer KEY`.")
        scheme, _, key = authorization.partition(" ")
        # Digests are compared, never keys, so the time of a look-up does not show which key was nearly right.
        found = self._keys.get(digest(key.strip()))
        if scheme.lower() != "bearer" or found is None:
            raise unauthorized("Incorrect API key provided.")
        return found


class SharedKeys:
    """The keys that the supervisor has published, as they are at each request. Implements `Keys`.

    It accepts none before the first publication.
    """

    def __init__(self, page: KeysReader) -> None:
        self._page = page
        self._version = 0
        self._ring = KeyRing(())

    def check(self, authorization: str | None) -> Key:
        """Return the key in this ``Authorization`` header. Raises ApiError (401) if it is not accepted now."""
        if self._page.version != self._version:
            self._version, keys = self._page.read()
            self._ring = KeyRing(keys)
        return self._ring.check(authorization)
