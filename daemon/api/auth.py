"""API keys. Every route needs a key unless the route table makes it public, so no new route is public by mistake."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple

from daemon.api.errors import unauthorized
from daemon.config import ConfigError
from daemon.control.policy.priority import ALLOWED, parse_priority


class Key(NamedTuple):
    """An accepted key, as its SHA-256 digest. `priority` applies to its requests that set none."""

    digest: bytes
    priority: int = 0


# The key of the current request. One asyncio task serves all requests of a connection, so set it for every request.
current_key: ContextVar[Key | None] = ContextVar("current_key", default=None)


class KeyRing:
    """The accepted keys."""

    def __init__(self, keys: Iterable[Key]) -> None:
        self._keys = list(keys)

    @classmethod
    def load(cls, file: Path) -> KeyRing:
        """Load the keys of a file: one per line, optionally followed by ``priority=high`` (see `Key`).

        Blank lines and lines that start with ``#`` are ignored. Raises ConfigError if the file cannot be read, a line
        has another form, or no line has a key, because an empty ring would refuse all clients. No error message
        repeats any part of a line.
        """
        try:
            lines = file.read_text().splitlines()
        except OSError as e:
            raise ConfigError(f"api_key_file: cannot read {file}: {e.strerror}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"api_key_file: {file} is not text") from None
        keys: dict[bytes, Key] = {}
        for number, line in enumerate(lines, 1):
            try:
                if (key := parse_key(line)) and keys.setdefault(key.digest, key) != key:
                    raise ValueError("an earlier line gives this key another priority")
            except ValueError as e:
                raise ConfigError(f"api_key_file: line {number} of {file}: {e}") from None
        if not keys:
            raise ConfigError(f"api_key_file: {file} holds no key")
        return cls(keys.values())

    def check(self, authorization: str | None) -> Key:
        """Return the key in this ``Authorization`` header. Raises ApiError (401) if it is not in the ring."""
        if not authorization:
            raise unauthorized("You didn't provide an API key: send it as `Authorization: Bearer KEY`.")
        scheme, _, key = authorization.partition(" ")
        digest = _digest(key.strip())
        # Compare every digest in constant time: the time must not show which key was nearly right.
        matches = [known for known in self._keys if hmac.compare_digest(digest, known.digest)]
        if scheme.lower() != "bearer" or not matches:
            raise unauthorized("Incorrect API key provided.")
        return matches[0]


def parse_key(line: str) -> Key | None:
    """Return the key on a line of the key file, or None if the line has none.

    The message of a ValueError names the allowed form and repeats no part of the line.
    """
    if not line.strip() or line.strip().startswith("#"):
        return None
    key, *attributes = line.split()
    values = [a.removeprefix("priority=") for a in attributes if a.startswith("priority=")]
    if key.startswith("priority=") or len(attributes) > 1 or len(values) < len(attributes):
        raise ValueError("the line must be a key, or a key, a blank and `priority=` with one value")
    try:
        return Key(_digest(key), parse_priority(values[0]) if values else 0)
    except ValueError:
        raise ValueError(f"`priority=` must be followed by {ALLOWED}") from None


def _digest(key: str) -> bytes:
    # Header bytes that are not UTF-8 arrive as lone surrogates.
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
