"""API keys. Every route needs a key unless the route table makes it public, so no new route is public by mistake."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from typing import Protocol

from daemon.api.errors import unauthorized
from daemon.api.key_file import digest
from daemon.ipc.keys_page import Key, KeysReader

KEY_HEADERS = ("x-api-key", "api-key")  # of Anthropic's clients, and of Azure's

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


def sent_key(headers: Mapping[str, str]) -> tuple[str | None, ...]:
    """Return the arguments of `Keys.check` for a request with these headers."""
    return headers.get("Authorization"), *(headers.get(name) for name in KEY_HEADERS)


class Keys(Protocol):
    """The accepted keys."""

    def check(self, authorization: str | None, *bare: str | None) -> Key:
        """Return the first accepted key of a request. Raises ApiError (401) if it has none.

        `authorization`: its ``Authorization`` header. `bare`: its headers that hold a key and nothing else.
        """
        ...


class KeyRing:
    """A fixed set of keys. Implements `Keys`."""

    def __init__(self, keys: Iterable[Key]) -> None:
        self._keys = {key.digest: key for key in keys}

    def check(self, authorization: str | None, *bare: str | None) -> Key:
        """Return the first key of a request that is in the ring. Raises ApiError (401) if it has none."""
        scheme, _, bearer = (authorization or "").partition(" ")
        sent = [key for key in (bearer if scheme.lower() == "bearer" else None, *bare) if key]
        for key in sent:
            # Digests are compared, never keys, so the time of a look-up does not show which key was nearly right.
            if (found := self._keys.get(digest(key.strip()))) is not None:
                return found
        if sent or authorization:
            raise unauthorized("Incorrect API key provided.")
        raise unauthorized(
            "You didn't provide an API key: send it as `Authorization: Bearer KEY`, `x-api-key: KEY` or "
            "`api-key: KEY`."
        )


class SharedKeys:
    """The keys that the supervisor has published, as they are at each request. Implements `Keys`.

    It accepts none before the first publication.
    """

    def __init__(self, page: KeysReader) -> None:
        self._page = page
        self._version = 0
        self._ring = KeyRing(())

    def check(self, authorization: str | None, *bare: str | None) -> Key:
        """Return the first key of a request that is accepted now. Raises ApiError (401) if it has none."""
        if self._page.version != self._version:
            self._version, keys = self._page.read()
            self._ring = KeyRing(keys)
        return self._ring.check(authorization, *bare)
