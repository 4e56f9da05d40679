"""A ring of records between one producer process and one consumer process, safe under kill -9 of either.

Layout: page 0 holds the tail word (producer), page 1 the head word (consumer), then the data. Both words
are absolute byte counts that only grow, so a record's offset is also its sequence number: unique, and
known to both sides without being stored apart. A record is

    length u32 | crc32 u32 | offset u64 | sender incarnation u32 | receiver incarnation u32 | payload, padded to 8

with the CRC over payload and header; the offset in it makes bytes of an earlier lap unmistakable.

Commit is one aligned 8-byte store of the tail, after the record is complete: a producer that dies in
mid-write has written nothing. The consumer moves the head once the record's *effect* is safe: one that
dies before sees the record again (at least once; receivers drop repeats by epoch and position).
Never `struct.pack_into` on a live word: it stores a transient zero that the other side sees.
"""

from __future__ import annotations

import struct
from typing import NamedTuple
from zlib import crc32

PAGE = 4096
_HEADER = struct.Struct("<IIQII")
_SEED = struct.Struct("<IQII")
_WRAP = struct.Struct("<II")  # in place of a record: nothing more before the end of the buffer
_WRAP_MARK = 0xFFFFFFFF
_VISIBILITY_RETRIES = 10_000


class RingFault(RuntimeError):
    """The bytes in a ring are not what a producer could have written."""


class Record(NamedTuple):
    """One message. `payload` is a view into the ring: use it before `ack`."""

    offset: int
    sender: int  # incarnation that wrote it
    receiver: int  # incarnation it is meant for
    payload: memoryview


def ring_bytes(capacity: int) -> int:
    """Bytes of shared memory for a ring with `capacity` data bytes (a multiple of 4096)."""
    return 2 * PAGE + capacity


def largest_payload(capacity: int) -> int:
    """A payload up to this size always fits an empty ring, wherever its end lies."""
    return capacity // 2 - _HEADER.size - 8


class RingWriter:
    """The producing end. A restarted producer continues at the tail it finds."""

    def __init__(self, view: memoryview, incarnation: int) -> None:
        self._tail_word = view[:8].cast("Q")
        self._head_word = view[PAGE : PAGE + 8].cast("Q")
        self._data = view[2 * PAGE :]
        self._capacity = len(self._data)
        self._incarnation = incarnation
        self._tail: int = self._tail_word[0]
        self._head: int = self._head_word[0]  # cached; re-read only when the ring looks full

    def put(self, payload: bytes, receiver: int) -> bool:
        """Append one record; False if there is no room now. ValueError if there never could be."""
        size = _HEADER.size + (len(payload) + 7 & ~7)
        position = self._tail % self._capacity
        skip = self._capacity - position if position + size > self._capacity else 0
        if self._tail + skip + size - self._head > self._capacity and not self._make_room(skip + size, payload):
            return False
        if skip:
            self._data[position : position + 8] = _wrap(self._tail)
            position = 0
        offset = self._tail + skip
        crc = _checksum(payload, offset, self._incarnation, receiver)
        start = position + _HEADER.size
        self._data[start : start + len(payload)] = payload
        self._data[position:start] = _HEADER.pack(len(payload), crc, offset, self._incarnation, receiver)
        self._tail = offset + size
        self._tail_word[0] = self._tail
        return True

    def _make_room(self, wanted: int, payload: bytes) -> bool:
        if len(payload) > largest_payload(self._capacity):
            raise ValueError(f"a record of {len(payload)} bytes can never fit a ring of {self._capacity}")
        self._head = self._head_word[0]
        return self._tail + wanted - self._head <= self._capacity


class RingReader:
    """The consuming end. A restarted consumer sees again what its predecessor had not acknowledged."""

    def __init__(self, view: memoryview) -> None:
        self._tail_word = view[:8].cast("Q")
        self._head_word = view[PAGE : PAGE + 8].cast("Q")
        self._data = view[2 * PAGE :].toreadonly()
        self._capacity = len(self._data)
        self._cursor: int = self._head_word[0]

    def read(self) -> Record | None:
        """The next record, or None. Does not acknowledge. Raises RingFault on impossible bytes."""
        tail = self._tail_word[0]
        # On weakly ordered machines the tail may be seen before the bytes: then the CRC fails and we look again.
        for _ in range(_VISIBILITY_RETRIES):
            if self._cursor == tail:
                return None
            record = self._parse(tail)
            if record is not None:
                return record
        raise RingFault(f"record at offset {self._cursor} is corrupt")

    def ack(self) -> None:
        """Everything read so far has taken effect; its space may be written again."""
        self._head_word[0] = self._cursor

    def _parse(self, tail: int) -> Record | None:
        position = self._cursor % self._capacity
        if self._data[position : position + 8] == _wrap(self._cursor):
            self._cursor += self._capacity - position
            return None
        if position + _HEADER.size > self._capacity:
            return None
        length, crc, offset, sender, receiver = _HEADER.unpack_from(self._data, position)
        size = _HEADER.size + (length + 7 & ~7)
        if offset != self._cursor or size > tail - offset or position + size > self._capacity:
            return None
        start = position + _HEADER.size
        payload = self._data[start : start + length]
        if _checksum(payload, offset, sender, receiver) != crc:
            return None
        self._cursor += size
        return Record(offset, sender, receiver, payload)


def _wrap(offset: int) -> bytes:
    # The offset tells this lap's mark from an earlier one's.
    return _WRAP.pack(_WRAP_MARK, offset >> 3 & 0xFFFFFFFF)


def _checksum(payload: bytes | memoryview, offset: int, sender: int, receiver: int) -> int:
    return crc32(payload, crc32(_SEED.pack(len(payload), offset, sender, receiver)))
