"""Contiguous extents out of one arena: first fit, freed neighbours join. Pure."""

from __future__ import annotations

from bisect import bisect_left, insort

ALIGN = 64


class Arena:
    """Hands out [offset, offset + size) of an arena of `size` bytes, 64-byte aligned."""

    def __init__(self, size: int) -> None:
        self._free: list[tuple[int, int]] = [(0, size)]  # (offset, size), by offset, never adjacent
        self.free_bytes = size

    def allocate(self, size: int) -> int | None:
        """Offset of a new extent of at least `size` bytes, or None if no gap is that large."""
        size = rounded(size)
        for i, (offset, gap) in enumerate(self._free):
            if gap >= size:
                if gap == size:
                    del self._free[i]
                else:
                    self._free[i] = (offset + size, gap - size)
                self.free_bytes -= size
                return offset
        return None

    def free(self, offset: int, size: int) -> None:
        """Give back an extent exactly as allocated. ValueError if it overlaps what is free already."""
        size = rounded(size)
        i = bisect_left(self._free, (offset, 0))
        before = self._free[i - 1] if i else (-1, 0)
        after = self._free[i] if i < len(self._free) else None
        if before[0] + before[1] > offset or (after and offset + size > after[0]):
            raise ValueError(f"extent {offset}+{size} is free already")
        self.free_bytes += size
        if after and offset + size == after[0]:
            del self._free[i]
            size += after[1]
        if i and before[0] + before[1] == offset:
            self._free[i - 1] = (before[0], before[1] + size)
        else:
            insort(self._free, (offset, size))


def rounded(size: int) -> int:
    """`size` as the arena accounts it."""
    return max(ALIGN, size + ALIGN - 1 & -ALIGN)
