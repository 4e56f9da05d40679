"""The arena against a simple model."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from daemon.ipc.arena import ALIGN, Arena, rounded

SIZE = 64 * ALIGN


class ArenaMachine(RuleBasedStateMachine):
    """The arena against a list of all allocated arena."""

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena(SIZE)
        self.allocated: list[tuple[int, int]] = []  # offset, requested size

    def gaps(self) -> list[int]:
        """Return the sizes of the gaps between allocated arena."""
        edge, found = 0, []
        for offset, size in sorted(self.allocated):
            found.append(offset - edge)
            edge = offset + rounded(size)
        return [*found, SIZE - edge]

    @rule(size=st.integers(0, SIZE // 3))
    def allocate(self, size: int) -> None:
        largest = max(self.gaps())
        offset = self.arena.allocate(size)
        assert (offset is None) == (rounded(size) > largest)  # so adjacent free extents were joined
        if offset is not None:
            assert offset % ALIGN == 0
            self.allocated.append((offset, size))

    @rule(which=st.integers(0, 1000))
    def free(self, which: int) -> None:
        if self.allocated:
            self.arena.free(*self.allocated.pop(which % len(self.allocated)))

    @rule(which=st.integers(0, 1000))
    def free_twice(self, which: int) -> None:
        if self.allocated:
            extent = self.allocated.pop(which % len(self.allocated))
            self.arena.free(*extent)
            with pytest.raises(ValueError):
                self.arena.free(*extent)

    @invariant()
    def nothing_overlaps_and_bytes_add_up(self) -> None:
        assert all(gap >= 0 for gap in self.gaps())
        assert self.arena.free_bytes == sum(self.gaps())

    def teardown(self) -> None:
        for extent in self.allocated:
            self.arena.free(*extent)
        assert self.arena.allocate(SIZE) == 0


TestArena = ArenaMachine.TestCase
TestArena.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def test_overlapping_frees_are_an_error_and_add_no_bytes():
    arena = Arena(SIZE)
    a, b = arena.allocate(100), arena.allocate(100)
    arena.free(a, 100)
    with pytest.raises(ValueError):
        arena.free(a + ALIGN, 100)
    arena.free(b, 100)
    assert arena.free_bytes == SIZE


@given(st.lists(st.tuples(st.integers(1, 3000), st.booleans()), max_size=20))
def test_extents_that_are_reserved_are_as_if_allocated(wanted: list[tuple[int, bool]]):
    """A successor reserves what its predecessor had allocated and not freed, and has the same arena."""
    first, second, kept = Arena(1 << 14), Arena(1 << 14), []
    for size, keep in wanted:
        offset = first.allocate(size)
        if offset is not None:
            kept.append((offset, size, keep))
    for offset, size, keep in kept:
        if not keep:
            first.free(offset, size)
    for offset, size, keep in reversed(kept):
        if keep:
            second.reserve(offset, size)
            with pytest.raises(ValueError, match="not free"):
                second.reserve(offset, size)
    assert second.free_bytes == first.free_bytes
    assert second._free == first._free
    with pytest.raises(ValueError, match="not free"):
        second.reserve((1 << 14) - 64, 65)
