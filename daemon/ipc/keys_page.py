"""The keys page: the API keys that all frontends accept, and how the last change of them ended.

The supervisor alone reads the key file and writes the page. One store replaces all keys for all frontends, so no two
of them ever accept different keys, and a frontend that starts later accepts what the others accept, whatever stands
in the file by then. A request to read the file again is a number in shared memory, like a desired state: it outlives
the coordinator that wrote it. Keys are here as their SHA-256 digests only.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec import Struct

from daemon.ipc.board import BOARD_BYTES, BoardReader, BoardWriter

MAX_KEYS = 4096
MAX_TENANT = 64  # characters of a tenant's name, all ASCII
_KEY_BYTES = 120  # at most, of one encoded key
_KEYS_BYTES = MAX_KEYS * _KEY_BYTES * 2 + 64  # a board has two copies
_MAX_ERROR = 1000  # bytes
# The request number, the board of the last outcome and the board of the keys.
_REQUEST, _OUTCOME, _KEYS = 0, 64, 64 + BOARD_BYTES
KEYS_PAGE_BYTES = (_KEYS + _KEYS_BYTES + 4095) & -4096


class Key(Struct, array_like=True, frozen=True):
    """One accepted key."""

    digest: bytes  # SHA-256 of the key
    priority: int = 0  # of its requests that set none
    max_priority: int = 0  # the most urgent class that its requests may have; lower is more urgent
    tenant: str = ""  # its requests share cached prefixes only with those of this tenant; "": the common one


class KeysOutcome(Struct, array_like=True, frozen=True):
    """How the last attempt to read the key file ended, and the number of keys and tenants that are accepted since."""

    request: int  # number of the last request that it answers; 0: none
    keys: int
    tenants: int  # that are named
    added: int = 0
    removed: int = 0
    changed: int = 0  # keys that have another priority or another tenant than before
    error: str = ""  # why the former keys stay accepted; "": the file's keys are accepted


class KeysWriter:
    """The only writer of the keys and of outcomes, in the supervisor."""

    def __init__(self, page: memoryview) -> None:
        self._request = page[_REQUEST : _REQUEST + 8].cast("Q")
        self._outcome = BoardWriter(page[_OUTCOME:_KEYS])
        self._keys = BoardWriter(page[_KEYS : _KEYS + _KEYS_BYTES])

    @property
    def requested(self) -> int:
        """Number of the last request to read the key file again."""
        return int(self._request[0])

    def publish(self, keys: Sequence[Key]) -> None:
        """Make `keys` the accepted ones, at most MAX_KEYS."""
        self._keys.publish(_encode(keys))

    def report(self, outcome: KeysOutcome) -> None:
        """Publish how an attempt ended. Publish the keys before it."""
        # A path in the error may have any bytes.
        error = outcome.error.encode(errors="replace")[:_MAX_ERROR].decode(errors="ignore")
        self._outcome.publish(_encode(msgspec.structs.replace(outcome, error=error)))


class KeysReader:
    """The accepted keys, for a frontend."""

    def __init__(self, page: memoryview) -> None:
        self._keys = BoardReader(page[_KEYS : _KEYS + _KEYS_BYTES])

    @property
    def version(self) -> int:
        """Number of publications; costs one load. Equal versions mean equal keys."""
        return self._keys.version

    def read(self) -> tuple[int, list[Key]]:
        """Return (version, accepted keys); (0, []) before the first publication."""
        found = self._keys.read()
        return (found[0], _decode_keys(found[1])) if found is not None else (0, [])


class KeysRequester:
    """The requests to read the key file again and their outcomes, in the coordinator, their only writer."""

    def __init__(self, page: memoryview) -> None:
        self._request = page[_REQUEST : _REQUEST + 8].cast("Q")
        self._outcome = BoardReader(page[_OUTCOME:_KEYS])

    def request(self) -> int:
        """Ask the supervisor to read the key file again; return the number of the request."""
        number = int(self._request[0]) + 1
        self._request[0] = number
        return number

    def outcome(self) -> KeysOutcome | None:
        """Return how the last attempt ended; None if the daemon has no key file."""
        found = self._outcome.read()
        return _decode_outcome(found[1]) if found is not None else None


_encode = msgspec.msgpack.Encoder().encode
_decode_keys = msgspec.msgpack.Decoder(list[Key]).decode
_decode_outcome = msgspec.msgpack.Decoder(KeysOutcome).decode
