from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from daemon.ipc.arena import ALIGN, Arena, rounded

ARENA = 64 * ALIGN


class ArenaMachine(RuleBasedStateMachine):
    """Against the plain list of what is held."""

    def __init__(self) -> None:
        super().__init__()
        self.extents = Arena(ARENA)
        self.held: list[tuple[int, int]] = []  # offset, size as asked

    def gaps(self) -> list[int]:
        """Sizes of the stretches that nothing held covers."""
        edge, found = 0, []
        for offset, size in sorted(self.held):
            found.append(offset - edge)
            edge = offset + rounded(size)
        return [*found, ARENA - edge]

    @rule(size=st.integers(0, ARENA // 3))
    def allocate(self, size: int) -> None:
        largest = max(self.gaps())
        offset = self.extents.allocate(size)
        assert (offset is None) == (rounded(size) > largest)  # so freed neighbours have been joined
        if offset is not None:
            assert offset % ALIGN == 0
            self.held.append((offset, size))

    @rule(which=st.integers(0, 1000))
    def free(self, which: int) -> None:
        if self.held:
            self.extents.free(*self.held.pop(which % len(self.held)))

    @rule(which=st.integers(0, 1000))
    def free_twice(self, which: int) -> None:
        if self.held:
            extent = self.held.pop(which % len(self.held))
            self.extents.free(*extent)
            with pytest.raises(ValueError):
                self.extents.free(*extent)

    @invariant()
    def nothing_overlaps_and_bytes_add_up(self) -> None:
        assert all(gap >= 0 for gap in self.gaps())
        assert self.extents.free_bytes == sum(self.gaps())

    def teardown(self) -> None:
        for extent in self.held:
            self.extents.free(*extent)
        assert self.extents.allocate(ARENA) == 0


TestArena = ArenaMachine.TestCase
TestArena.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def test_an_arena_is_not_grown_by_overlapping_frees():
    extents = Arena(ARENA)
    a, b = extents.allocate(100), extents.allocate(100)
    extents.free(a, 100)
    with pytest.raises(ValueError):
        extents.free(a + ALIGN, 100)
    extents.free(b, 100)
    assert extents.free_bytes == ARENA
