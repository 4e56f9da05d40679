"""A ring of records from one producer process to one consumer process; it survives kill -9 of either.

Layout: page 0 contains the tail word (producer), page 1 the head word (consumer), then comes the data. Both words are
absolute byte counts that only grow. So the offset of a record is also its sequence number: it is unique, and both
sides know it without a separate field. A record is

    length u32 | crc32 u32 | offset u64 | sender incarnation u32 | receiver incarnation u32 | payload, padded to 8

with the CRC over payload and header. The offset in the header tells a record from the bytes of an earlier lap.

Commit is one aligned 8-byte store of the tail, after the record is complete: a producer that dies in the middle of a
write has written nothing. The consumer moves the head when the *effect* of a record is safe: a consumer that dies
before that reads the record again (at-least-once; receivers drop repeats by epoch and position). Never use
`struct.pack_into` on a word in use: it stores a transient zero that the other side can read.
"""

from __future__ import annotations

import struct
from typing import NamedTuple
from zlib import crc32

PAGE = 4096
_HEADER = struct.Struct("<IIQII")
_SEED = struct.Struct("<IQII")
_WRAP = struct.Struct("<II")  # instead of a record: the rest of the buffer is unused
_WRAP_MARK = 0xFFFFFFFF
_VISIBILITY_RETRIES = 10_000


class RingFault(RuntimeError):
    """A ring contains bytes that no producer can have written."""


class Record(NamedTuple):
    """One message. `payload` is a view of the ring that is valid until `ack`."""

    offset: int
    sender: int  # incarnation that has written it
    receiver: int  # incarnation that it is for
    payload: memoryview


def ring_bytes(capacity: int) -> int:
    """Return the bytes of shared memory for a ring with `capacity` data bytes (a multiple of 4096)."""
    return 2 * PAGE + capacity


def largest_payload(capacity: int) -> int:
    """Return the size up to which a payload always fits an empty ring, wherever head and tail are."""
    return capacity // 2 - _HEADER.size - 8


class RingWriter:
    """The producing end. A restarted producer continues at the tail that it reads."""

    def __init__(self, view: memoryview, incarnation: int) -> None:
        self._tail_word = view[:8].cast("Q")
        self._head_word = view[PAGE : PAGE + 8].cast("Q")
        self._data = view[2 * PAGE :]
        self._capacity = len(self._data)
        self._incarnation = incarnation
        self._tail: int = self._tail_word[0]
        self._head: int = self._head_word[0]  # cached; read again only if the ring seems to be full

    def put(self, payload: bytes, receiver: int) -> bool:
        """Append one record; return False if there is no room now.

        Raises ValueError if the record does not fit an empty ring.
        """
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
    """The consuming end. A restarted consumer reads the records again that its predecessor had not acknowledged."""

    def __init__(self, view: memoryview) -> None:
        self._tail_word = view[:8].cast("Q")
        self._head_word = view[PAGE : PAGE + 8].cast("Q")
        self._data = view[2 * PAGE :].toreadonly()
        self._capacity = len(self._data)
        self._cursor: int = self._head_word[0]

    def read(self) -> Record | None:
        """Return the next record, or None. It is not acknowledged yet. Raises RingFault for impossible bytes."""
        tail = self._tail_word[0]
        # On weakly ordered machines the new tail may be visible before the bytes: then the CRC fails; read again.
        for _ in range(_VISIBILITY_RETRIES):
            if self._cursor == tail:
                return None
            record = self._parse(tail)
            if record is not None:
                return record
        raise RingFault(f"record at offset {self._cursor} is corrupt")

    def ack(self) -> None:
        """Acknowledge all records read so far: their effect is safe, and the producer may overwrite them."""
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
    # The offset tells the mark of this lap from the mark of an earlier lap.
    return _WRAP.pack(_WRAP_MARK, offset >> 3 & 0xFFFFFFFF)


def _checksum(payload: bytes | memoryview, offset: int, sender: int, receiver: int) -> int:
    return crc32(payload, crc32(_SEED.pack(len(payload), offset, sender, receiver)))
