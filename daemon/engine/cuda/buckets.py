"""Batch sizes with a CUDA graph (buckets). Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence


def graph_buckets(largest: int) -> tuple[int, ...]:
    """Return the batch sizes to capture, ascending, the last one exactly `largest`.

    They are 1, 2, 4, then every 8 up to 128, every 16 up to 256, every 32 above. So a batch has little padding.
    """
    if largest < 1:
        raise ValueError(f"a batch of {largest} rows has no graph")
    sizes = [1, 2, 4, *range(8, 128, 8), *range(128, 256, 16), *range(256, largest, 32)]
    return (*(size for size in sizes if size < largest), largest)


def choose_bucket(buckets: Sequence[int], rows: int) -> int:
    """Return the smallest of the ascending `buckets` that holds `rows`. Raises ValueError if none does."""
    at = bisect_left(buckets, rows)
    if rows < 1 or at == len(buckets):
        raise ValueError(f"no bucket holds {rows} rows; the largest is {buckets[-1]}")
    return buckets[at]


def widest_gap(buckets: Sequence[int]) -> int:
    """Return the largest number of padding rows that a batch can get."""
    return max((b - a - 1 for a, b in zip((0, *buckets), buckets, strict=False)), default=0)
