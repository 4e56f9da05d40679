"""A board slot: the latest facts of one process, readable by all, never torn, never blocking.

A *latch*, not a seqlock: two copies, and a version word that says which one is complete. The writer
fills the other copy and then moves the word with one aligned store, so a writer killed in mid-write
leaves the last complete copy readable for ever (a seqlock would hang its readers on an odd counter).
"""

from __future__ import annotations

import struct
from zlib import crc32

SLOT_BYTES = 4096
_COPY_BYTES = (SLOT_BYTES - 64) // 2
_HEADER = struct.Struct("<IIQ")  # length, crc, version
MAX_FACTS = _COPY_BYTES - _HEADER.size
_READ_RETRIES = 1_000


class BoardFault(RuntimeError):
    """A slot whose current copy never became consistent."""


class BoardWriter:
    """The one writer of a slot. A restarted writer continues the version count."""

    def __init__(self, slot: memoryview) -> None:
        self._word = slot[:8].cast("Q")
        self._slot = slot
        self._version: int = self._word[0]

    def publish(self, facts: bytes) -> None:
        """Make `facts` the current content. ValueError above MAX_FACTS bytes."""
        if len(facts) > MAX_FACTS:
            raise ValueError(f"{len(facts)} bytes of facts do not fit a board slot ({MAX_FACTS})")
        version = self._version + 1
        base = 64 + (version & 1) * _COPY_BYTES
        start = base + _HEADER.size
        self._slot[start : start + len(facts)] = facts
        self._slot[base:start] = _HEADER.pack(len(facts), _checksum(facts, version), version)
        self._version = self._word[0] = version


class BoardReader:
    """A reader of one slot."""

    def __init__(self, slot: memoryview) -> None:
        self._word = slot[:8].cast("Q")
        self._slot = slot.toreadonly()

    @property
    def version(self) -> int:
        """Grows with each publication; 0 before the first. Equal versions mean equal facts."""
        return int(self._word[0])

    def read(self) -> tuple[int, bytes] | None:
        """(version, facts) as last published, or None before the first publication."""
        for _ in range(_READ_RETRIES):
            version = self._word[0]
            if version == 0:
                return None
            base = 64 + (version & 1) * _COPY_BYTES
            length, crc, written = _HEADER.unpack_from(self._slot, base)
            if written == version and length <= MAX_FACTS:
                start = base + _HEADER.size
                facts = bytes(self._slot[start : start + length])  # two publications later it is overwritten
                if _checksum(facts, version) == crc:
                    return version, facts
        raise BoardFault("a board slot stayed inconsistent")


def _checksum(facts: bytes, version: int) -> int:
    return crc32(facts, version & 0xFFFFFFFF)
