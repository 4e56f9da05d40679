"""One measure for equal engines. Pure.

What an engine measured at its start is noisy where others were starting beside it. Two equal engines that believe
in different knees would be loaded unequally for as long as they live, so equals take the median of their measures.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from daemon.ipc.messages import EngineFacts


class Measure(NamedTuple):
    """See the fields of that name in `EngineFacts`; 0: no limit."""

    knee: int
    ideal_tokens: int


def agree(own: Measure, make: str, others: Iterable[EngineFacts]) -> Measure:
    """What an engine of that make publishes, given what it measured and what the others are. No limit counts as a
    large one."""
    measured = [own, *(Measure(f.measured_knee, f.measured_ideal_tokens) for f in others if f.make == make)]
    return Measure(_middle(m.knee for m in measured), _middle(m.ideal_tokens for m in measured))


def _middle(values: Iterable[int]) -> int:
    """The lower median."""
    ordered = sorted(values, key=lambda v: (v == 0, v))
    return ordered[(len(ordered) - 1) // 2]
