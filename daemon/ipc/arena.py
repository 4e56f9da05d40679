"""An allocator of contiguous extents in one arena: first fit, adjacent free extents are joined. Pure."""

from __future__ import annotations

from bisect import bisect_left, insort

ALIGN = 64


class Arena:
    """Allocates extents [offset, offset + size) of an arena of `size` bytes, 64-byte aligned."""

    def __init__(self, size: int) -> None:
        self._free: list[tuple[int, int]] = [(0, size)]  # (offset, size), sorted, never adjacent
        self.free_bytes = size

    def allocate(self, size: int) -> int | None:
        """Return the offset of a new extent of at least `size` bytes, or None if no gap is large enough."""
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

    def reserve(self, offset: int, size: int) -> None:
        """Take the extent that a predecessor has allocated at `offset`. Raises ValueError if it is not free."""
        size = rounded(size)
        i = bisect_left(self._free, (offset + 1, 0)) - 1
        start, gap = self._free[i] if i >= 0 else (0, 0)
        if offset % ALIGN or offset + size > start + gap:
            raise ValueError(f"extent {offset}+{size} is not free")
        parts = ((start, offset - start), (offset + size, start + gap - offset - size))
        self._free[i : i + 1] = [part for part in parts if part[1]]
        self.free_bytes -= size

    def free(self, offset: int, size: int) -> None:
        """Free an extent exactly as it was allocated. Raises ValueError if it overlaps a free extent."""
        size = rounded(size)
        i = bisect_left(self._free, (offset, 0))
        before = self._free[i - 1] if i else (-1, 0)
        after = self._free[i] if i < len(self._free) else None
        if before[0] + before[1] > offset or (after and offset + size > after[0]):
            raise ValueError(f"extent {offset}+{size} is already free")
        self.free_bytes += size
        if after and offset + size == after[0]:
            del self._free[i]
            size += after[1]
        if i and before[0] + before[1] == offset:
            self._free[i - 1] = (before[0], before[1] + size)
        else:
            insort(self._free, (offset, size))


def rounded(size: int) -> int:
    """Return the number of bytes that the arena uses for an extent of `size` bytes."""
    return max(ALIGN, size + ALIGN - 1 & -ALIGN)
