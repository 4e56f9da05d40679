"""Masks of the tokens that may be sampled, applied to logits on the host."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from daemon.engine.jit import kernel
from daemon.engine.sampling.penalties import Undo

_ALL = slice(None)


@kernel("void(float32[::1], int32[::1])")
def _forbid(logits: np.ndarray, mask: np.ndarray) -> None:
    """Set the `logits` (float32[vocab]) of the tokens whose bits in `mask` (int32[words]) are 0 to -inf."""
    for word in range(len(mask)):
        bits = mask[word]
        if bits == -1:
            continue
        first = word * 32
        for bit in range(min(32, len(logits) - first)):
            if not (bits >> bit) & 1:
                logits[first + bit] = -np.inf


def apply(logits: NDArray[np.float32], mask: NDArray[np.int32]) -> Undo:
    """Leave only the tokens of `mask`. `penalties.restore` undoes it with the returned value."""
    before = logits.copy()
    _forbid(logits, mask)
    return [(_ALL, before)]
