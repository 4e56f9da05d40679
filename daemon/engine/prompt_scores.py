"""The scored positions of a step's rows: which tokens they score, and the records that they give. Pure, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from daemon.engine.runner import Row
from daemon.ipc.prompt_logprobs import record_bytes

SLICE_BYTES = 16 << 20
"""Of the logits that are computed at a time: those of a whole prompt would not fit."""


def slice_rows(vocab_size: int) -> int:
    """Return the number of positions whose logits are computed at a time."""
    return max(1, SLICE_BYTES // (4 * vocab_size))


class Scores(NamedTuple):
    """Of scored positions. The alternatives are the likeliest tokens, in order."""

    logprobs: NDArray[np.float32]  # [positions] of the prompt's next token
    ranks: NDArray[np.uint32]  # [positions] of the same; 1: the likeliest
    top_ids: NDArray[np.uint32]  # [positions, alternatives]
    top_logprobs: NDArray[np.float32]  # [positions, alternatives]


def targets(rows: Sequence[Row]) -> NDArray[np.int64]:
    """Return the tokens that the rows score, one row after the other."""
    found = chain.from_iterable(row.request.tokens[row.scored.start + 1 : row.scored.stop + 1] for row in rows)
    return np.fromiter(found, np.int64, sum(len(row.scored) for row in rows))


def indices(rows: Sequence[Row]) -> NDArray[np.int64]:
    """Return the scored positions as indices in the tokens of all rows, concatenated."""
    parts, first = [np.empty(0, np.int64)], 0
    for row in rows:
        parts.append(np.arange(row.scored.start, row.scored.stop) + (first - row.start))
        first += row.count
    return np.concatenate(parts)


def num_alternatives(rows: Sequence[Row]) -> int:
    """Return the largest number of alternatives that a scored row asks for."""
    return max((row.request.sampling.prompt_logprobs for row in rows if row.scored), default=0)


def records(rows: Sequence[Row], scores: Scores) -> dict[int, bytes]:
    """Return the records of each scored row, by its index. `scores`: of the positions of all rows."""
    found, first = {}, 0
    for i, row in enumerate(rows):
        if row.scored:
            end = first + len(row.scored)
            found[i] = _pack(scores, first, end, row.request.sampling.prompt_logprobs)
            first = end
    return found


def _pack(scores: Scores, first: int, end: int, top: int) -> bytes:
    packed = np.empty((end - first, record_bytes(top) // 4), np.uint32)
    packed[:, 0] = scores.logprobs[first:end].view(np.uint32)
    packed[:, 1] = scores.ranks[first:end]
    packed[:, 2::2] = scores.top_ids[first:end, :top]
    packed[:, 3::2] = np.ascontiguousarray(scores.top_logprobs[first:end, :top]).view(np.uint32)
    return packed.tobytes()
