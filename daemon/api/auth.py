"""API keys. Routes are closed unless the route table opens them, so a new one is never open by accident."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

from daemon.api.errors import unauthorized
from daemon.config import ConfigError


class KeyRing:
    """The keys that are accepted, kept only as SHA-256 digests."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    @classmethod
    def load(cls, file: Path) -> KeyRing:
        """Keys from a file: one a line; blank lines and lines beginning with ``#`` do not count.

        Raises ConfigError if the file cannot be read or holds no key: an empty ring would lock everybody out.
        """
        try:
            lines = file.read_text().splitlines()
        except OSError as e:
            raise ConfigError(f"api_key_file: cannot read {file}: {e.strerror}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"api_key_file: {file} is not text") from None
        keys = [line.strip() for line in lines]
        keys = [key for key in keys if key and not key.startswith("#")]
        if not keys:
            raise ConfigError(f"api_key_file: {file} holds no key")
        return cls(keys)

    def check(self, authorization: str | None) -> None:
        """Raise ApiError (401) unless this ``Authorization`` header carries one of the keys."""
        if not authorization:
            raise unauthorized("You didn't provide an API key: send it as `Authorization: Bearer KEY`.")
        scheme, _, key = authorization.partition(" ")
        digest = _digest(key.strip())
        # Every digest is compared, so the time tells nothing about which one came near.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() != "bearer" or not any(matches):
            raise unauthorized("Incorrect API key provided.")


def _digest(key: str) -> bytes:
    # Header bytes that are no UTF-8 arrive as lone surrogates.
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
