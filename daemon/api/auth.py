"""API keys. Routes are closed unless the route table opens them, so a new one is never open by accident."""

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
    """An accepted key, by its SHA-256 digest. `priority`: of its requests that name none."""

    digest: bytes
    priority: int = 0


# The key that the request being handled came with. One task serves all requests of a connection: set it for each.
current_key: ContextVar[Key | None] = ContextVar("current_key", default=None)


class KeyRing:
    """The keys that are accepted."""

    def __init__(self, keys: Iterable[Key]) -> None:
        self._keys = list(keys)

    @classmethod
    def load(cls, file: Path) -> KeyRing:
        """Keys from a file: one a line, perhaps followed by ``priority=high`` (`Key`); blank lines and lines
        beginning with ``#`` do not count.

        Raises ConfigError if the file cannot be read, a line is not so, or no line holds a key: an empty ring would
        lock everybody out. No error shows anything of a line.
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
        """The key that this ``Authorization`` header carries. Raises ApiError (401) if it is none of the ring's."""
        if not authorization:
            raise unauthorized("You didn't provide an API key: send it as `Authorization: Bearer KEY`.")
        scheme, _, key = authorization.partition(" ")
        digest = _digest(key.strip())
        # Every digest is compared, so the time tells nothing about which one came near.
        matches = [known for known in self._keys if hmac.compare_digest(digest, known.digest)]
        if scheme.lower() != "bearer" or not matches:
            raise unauthorized("Incorrect API key provided.")
        return matches[0]


def parse_key(line: str) -> Key | None:
    """The key on a line of the key file, if any. ValueError says what may stand there, and nothing of what does."""
    if not line.strip() or line.strip().startswith("#"):
        return None
    key, *attributes = line.split()
    values = [a.removeprefix("priority=") for a in attributes if a.startswith("priority=")]
    if key.startswith("priority=") or len(attributes) > 1 or len(values) < len(attributes):
        raise ValueError("it must be a key, or a key, a blank and `priority=` with one value")
    try:
        return Key(_digest(key), parse_priority(values[0]) if values else 0)
    except ValueError:
        raise ValueError(f"`priority=` must be followed by {ALLOWED}") from None


def _digest(key: str) -> bytes:
    # Header bytes that are no UTF-8 arrive as lone surrogates.
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
