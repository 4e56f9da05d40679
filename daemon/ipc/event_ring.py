"""The event ring of one process: the latest few hundred events, in shared memory, readable by every process.

One process writes and never waits for a reader: the newest event overwrites the oldest. Any process reads at any
time. Each reader has its own position and gets the number of events that were overwritten before it read them. The
ring outlives its writer; a restarted writer continues the count.

Layout: the head word (number of events ever written), then N entries of 256 bytes; event n is in entry n mod N:

    sequence u64 | length u32 | crc32 u32 | payload

with the CRC over length, sequence and payload. Commit is one aligned store of the head, after the entry is complete.
A writer that dies in the middle of a write has committed nothing. The event that it was overwriting, the oldest one,
is lost, and its checksum shows that.
"""

from __future__ import annotations

import struct
import time
from typing import NamedTuple
from zlib import crc32

import msgspec

from daemon.ipc.events import Event
from daemon.ipc.messages import encode

ENTRY_BYTES = 256
_HEADER = struct.Struct("<QII")
_SEED = struct.Struct("<QI")
MAX_EVENT = ENTRY_BYTES - _HEADER.size
_VISIBILITY_RETRIES = 1_000
_decode = msgspec.msgpack.Decoder(tuple[float, Event]).decode


class Entry(NamedTuple):
    """An event and the time at which it was written, seconds since 1970."""

    time: float
    event: Event


class EventWriter:
    """The only writer of a ring, for one thread of one process.

    `view` is writable, 8-byte aligned, a multiple of ENTRY_BYTES long and was zeroed when it was created.
    """

    def __init__(self, view: memoryview) -> None:
        self._head = view[:8].cast("Q")
        self._entries = view[ENTRY_BYTES:]
        self._num_entries = len(self._entries) // ENTRY_BYTES

    def write(self, event: Event) -> None:
        """Write an event. Raises ValueError above MAX_EVENT bytes."""
        payload = encode((time.time(), event))
        length = len(payload)
        if length > MAX_EVENT:
            raise ValueError(f"an event of {length} bytes does not fit an entry of the event ring ({MAX_EVENT})")
        sequence = self._head[0]
        base = sequence % self._num_entries * ENTRY_BYTES
        start = base + _HEADER.size
        self._entries[start : start + length] = payload
        self._entries[base:start] = _HEADER.pack(sequence, length, _checksum(payload, sequence))
        self._head[0] = sequence + 1


class EventReader:
    """A reader of one ring; it starts at the oldest event in the ring."""

    def __init__(self, view: memoryview) -> None:
        self._head = view[:8].cast("Q")
        self._entries = view[ENTRY_BYTES:].toreadonly()
        self._num_entries = len(self._entries) // ENTRY_BYTES
        self._position = max(0, self._head[0] - self._num_entries)

    def read(self) -> tuple[list[Entry], int]:
        """Return the events written since the last call, in order, and the number of events that were lost.

        Together they account for every event written until this call, exactly once.
        """
        head = self._head[0]
        first = max(self._position, head - self._num_entries)
        found = [entry for n in range(first, head) if (entry := self._read_entry(n)) is not None]
        lost = head - self._position - len(found)
        self._position = head
        return found, lost

    def _read_entry(self, sequence: int) -> Entry | None:
        """Return event number `sequence`, or None if it is overwritten or being overwritten."""
        base = sequence % self._num_entries * ENTRY_BYTES
        start = base + _HEADER.size
        # On weakly ordered machines the new head may be visible before the bytes: read again.
        for _ in range(_VISIBILITY_RETRIES):
            written, length, crc = _HEADER.unpack_from(self._entries, base)
            if written == sequence and length <= MAX_EVENT:
                payload = bytes(self._entries[start : start + length])  # a copy: the writer may overwrite it
                if _checksum(payload, sequence) == crc:
                    return Entry(*_decode(payload))
            if self._head[0] - sequence >= self._num_entries:
                return None
        return None


def _checksum(payload: bytes, sequence: int) -> int:
    return crc32(payload, crc32(_SEED.pack(sequence, len(payload))))
