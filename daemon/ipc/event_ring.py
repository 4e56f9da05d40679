"""The event log of one process: the latest few hundred things it did, in shared memory, for whoever looks.

One process writes, without waiting and without asking who reads: the newest event takes the place of the oldest.
Any process reads at any time, each reader from a position of its own, and learns how many events it came too late
for. The log outlives its writer; a restarted one goes on counting.

Layout: the head word (how many events were ever written), then slots of 256 bytes, event n in slot n mod SLOTS:

    sequence u64 | length u32 | crc32 u32 | payload

with the CRC over length, sequence and payload. Commit is one aligned store of the head, after the slot is
complete. A writer that dies in mid-write has committed nothing; the event whose place it was about to take, the
oldest, is lost, and its checksum says so.
"""

from __future__ import annotations

import struct
import time
from typing import NamedTuple
from zlib import crc32

import msgspec

from daemon.ipc.events import Event
from daemon.ipc.messages import encode

SLOT_BYTES = 256
_HEADER = struct.Struct("<QII")
_SEED = struct.Struct("<QI")
MAX_EVENT = SLOT_BYTES - _HEADER.size
_VISIBILITY_RETRIES = 1_000
_decode = msgspec.msgpack.Decoder(tuple[float, Event]).decode


class Entry(NamedTuple):
    """An event and when it was written, seconds since 1970."""

    time: float
    event: Event


class EventWriter:
    """The writing end, for one thread of one process.

    `view` is writable, 8-byte aligned, a multiple of SLOT_BYTES long and was zeroed when it was created.
    """

    def __init__(self, view: memoryview) -> None:
        self._head = view[:8].cast("Q")
        self._slots = view[SLOT_BYTES:]
        self._count = len(self._slots) // SLOT_BYTES

    def write(self, event: Event) -> None:
        """Add an event. ValueError above MAX_EVENT bytes."""
        payload = encode((time.time(), event))
        length = len(payload)
        if length > MAX_EVENT:
            raise ValueError(f"an event of {length} bytes does not fit a slot of the event log ({MAX_EVENT})")
        sequence = self._head[0]
        base = sequence % self._count * SLOT_BYTES
        start = base + _HEADER.size
        self._slots[start : start + length] = payload
        self._slots[base:start] = _HEADER.pack(sequence, length, _checksum(payload, sequence))
        self._head[0] = sequence + 1


class EventReader:
    """A reader of one log, from the oldest event that it still holds."""

    def __init__(self, view: memoryview) -> None:
        self._head = view[:8].cast("Q")
        self._slots = view[SLOT_BYTES:].toreadonly()
        self._count = len(self._slots) // SLOT_BYTES
        self._position = max(0, self._head[0] - self._count)

    def read(self) -> tuple[list[Entry], int]:
        """What was written since the last call, in order, and how many events were lost in between.

        Both together account for every event written by the time of the call, exactly once.
        """
        head = self._head[0]
        first = max(self._position, head - self._count)
        found = [entry for n in range(first, head) if (entry := self._entry(n)) is not None]
        lost = head - self._position - len(found)
        self._position = head
        return found, lost

    def _entry(self, sequence: int) -> Entry | None:
        """Event number `sequence`, None if it is overwritten, or about to be."""
        base = sequence % self._count * SLOT_BYTES
        start = base + _HEADER.size
        # On weakly ordered machines the head may be seen before the bytes: then we look again.
        for _ in range(_VISIBILITY_RETRIES):
            written, length, crc = _HEADER.unpack_from(self._slots, base)
            if written == sequence and length <= MAX_EVENT:
                payload = bytes(self._slots[start : start + length])  # the writer waits for nobody
                if _checksum(payload, sequence) == crc:
                    return Entry(*_decode(payload))
            if self._head[0] - sequence >= self._count:
                return None
        return None


def _checksum(payload: bytes, sequence: int) -> int:
    return crc32(payload, crc32(_SEED.pack(sequence, len(payload))))
