"""Into which parts the KV of long sequences is split, so that one of them does not delay a batch of short ones. Pure.

A thread block of FlashInfer's decode kernel reads the KV of one sequence and one KV head, or a part of it. The graph
plan splits sequences by itself only while all decodes of the batch fit on the device at the same time. In a larger
batch each sequence is one part, and the step lasts as long as its longest sequence. On an H100, 64 decodes of which
one had 65,536 tokens and the others 1,024 took 0.9 ms a layer: nine times as long as without the long one.

But a graph is captured with more parts than rows. The spare parts suffice for the few sequences that are much longer
than the rest.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

WORTH_SPLITTING = 2
"""A sequence is split only if it then has more than this number of parts' worth of pages."""


def part_pages(pages: NDArray[np.int32], parts: int, *, least: int) -> int | None:
    """Return the pages of the largest part, or None if no sequence needs to be split.

    `pages`: int32[rows], the pages of each sequence. `parts`: how many parts the step may have in all. `least`: the
    smallest part that is worth a thread block. The result is the smallest size for which the parts suffice.
    """
    longest = int(pages.max())
    # No size below this one can do, so most batches end here.
    bound = max(least, -(-int(pages.sum()) // parts))
    if longest <= WORTH_SPLITTING * bound:
        return None
    low, high = bound, longest
    while low < high:
        middle = (low + high) // 2
        if int((-(-pages // middle)).sum()) > parts:
            low = middle + 1
        else:
            high = middle
    return low if longest > WORTH_SPLITTING * low else None
