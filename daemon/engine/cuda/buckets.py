"""Batch sizes that have a CUDA graph. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence


def graph_buckets(largest: int) -> tuple[int, ...]:
    """Batch sizes to capture, ascending, up to `largest` exactly.

    Padding costs little: 1, 2, 4 and 8 apart, a bucket wastes at most 8 rows up to 128, 16 up to 256, 32 above.
    """
    if largest < 1:
        raise ValueError(f"a batch of {largest} rows needs no graph")
    sizes = [1, 2, 4, *range(8, 128, 8), *range(128, 256, 16), *range(256, largest, 32)]
    return (*(size for size in sizes if size < largest), largest)


def choose_bucket(buckets: Sequence[int], rows: int) -> int:
    """The least of the ascending `buckets` that holds `rows`. Raises ValueError if none does."""
    at = bisect_left(buckets, rows)
    if rows < 1 or at == len(buckets):
        raise ValueError(f"no bucket holds {rows} rows; the largest is {buckets[-1]}")
    return buckets[at]


def widest_gap(buckets: Sequence[int]) -> int:
    """Most rows of padding that any choice brings."""
    return max((b - a - 1 for a, b in zip((0, *buckets), buckets, strict=False)), default=0)
