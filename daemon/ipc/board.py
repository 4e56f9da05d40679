"""A board: the latest facts of one process. Every process can read it; no read is torn and no read blocks.

A board is a *latch*, not a seqlock: it has two copies and a version word that selects the complete one. The writer
fills the other copy and then changes the word with one aligned store. So a writer that is killed in the middle of a
write leaves the last complete copy readable for ever (with a seqlock, readers would wait for ever on an odd counter).
"""

from __future__ import annotations

import struct
from zlib import crc32

BOARD_BYTES = 4096  # of a process's board; other boards may be larger
_HEADER = struct.Struct("<IIQ")  # length, crc, version
_READ_RETRIES = 1_000


class BoardFault(RuntimeError):
    """A board whose current copy did not become consistent."""


def _copy_bytes(size: int) -> int:
    return (size - 64) // 2


def max_facts(size: int) -> int:
    """Return the largest content of a board of `size` bytes."""
    return _copy_bytes(size) - _HEADER.size


MAX_FACTS = max_facts(BOARD_BYTES)


class BoardWriter:
    """The only writer of a board. A restarted writer continues the version count."""

    def __init__(self, board: memoryview) -> None:
        self._word = board[:8].cast("Q")
        self._board = board
        self._copy_bytes = _copy_bytes(len(board))
        self._version: int = self._word[0]

    def publish(self, facts: bytes) -> None:
        """Make `facts` the current content. Raises ValueError above `max_facts` bytes."""
        most = self._copy_bytes - _HEADER.size
        if len(facts) > most:
            raise ValueError(f"{len(facts)} bytes of facts do not fit a board ({most})")
        version = self._version + 1
        base = 64 + (version & 1) * self._copy_bytes
        start = base + _HEADER.size
        self._board[start : start + len(facts)] = facts
        self._board[base:start] = _HEADER.pack(len(facts), _checksum(facts, version), version)
        self._version = self._word[0] = version


class BoardReader:
    """A reader of one board."""

    def __init__(self, board: memoryview) -> None:
        self._word = board[:8].cast("Q")
        self._board = board.toreadonly()
        self._copy_bytes = _copy_bytes(len(board))

    @property
    def version(self) -> int:
        """Number of publications; 0 before the first. Equal versions mean equal facts."""
        return int(self._word[0])

    def read(self) -> tuple[int, bytes] | None:
        """Return (version, facts) as last published, or None before the first publication.

        Raises BoardFault if the board stays inconsistent.
        """
        for _ in range(_READ_RETRIES):
            version = self._word[0]
            if version == 0:
                return None
            base = 64 + (version & 1) * self._copy_bytes
            length, crc, written = _HEADER.unpack_from(self._board, base)
            if written == version and length <= self._copy_bytes - _HEADER.size:
                start = base + _HEADER.size
                facts = bytes(self._board[start : start + length])  # a copy: a later publication overwrites it
                if _checksum(facts, version) == crc:
                    return version, facts
        raise BoardFault("a board stayed inconsistent")


def _checksum(facts: bytes, version: int) -> int:
    return crc32(facts, version & 0xFFFFFFFF)
