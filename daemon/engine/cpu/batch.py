"""Conversion of a step plan to the arrays that the CPU kernels read. No torch."""

from __future__ import annotations

from itertools import chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from daemon.engine.cpu.attention import TILE_QUERIES, AttentionShape
from daemon.engine.prompt_scores import indices
from daemon.engine.runner import Row, StepPlan

Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]

_NONE: Ints = np.empty(0, np.int32)


class Batch(NamedTuple):
    """One step. The tokens of all rows are concatenated, row after row."""

    tokens: Longs  # [tokens] ids to embed
    positions: Ints  # [tokens] position of each in its sequence
    slots: Longs  # [tokens] pool element where its key of layer 0 begins
    tables: Ints  # [tokens] index in `blocks` where its sequence's block table begins
    blocks: Ints  # the block tables of all rows, concatenated
    num_single: int  # the first `num_single` tokens use `attend_tokens`, the others `attend_tiles`
    tiles: Ints  # [n, 2] first token and count of each tile
    sampled: Ints  # indices of the tokens whose logits are sampled, in the order of the rows
    scored: Ints  # indices of the tokens whose logits score the prompt's next token, in the order of the rows


def build_batch(plan: StepPlan, shape: AttentionShape, *, tiled: bool) -> Batch:
    """Build the arrays of `plan`. `tiled`: prefill chunks use tiles, not `attend_tokens` for each token."""
    rows = plan.rows
    counts = np.fromiter((row.count for row in rows), np.int64, len(rows))
    ends = np.cumsum(counts)
    starts = np.fromiter((row.start for row in rows), np.int64, len(rows))
    lengths = np.fromiter((len(row.request.block_table) for row in rows), np.int64, len(rows))
    tables = np.cumsum(lengths) - lengths
    blocks = np.fromiter(chain.from_iterable(r.request.block_table for r in rows), np.int64, int(lengths.sum()))
    tokens = np.fromiter(chain.from_iterable(_tokens(row) for row in rows), np.int64, int(ends[-1]))
    positions = np.arange(len(tokens)) + np.repeat(starts - ends + counts, counts)
    token_tables = np.repeat(tables, counts)
    block, offset = np.divmod(positions, shape.block_size)
    slots = blocks[token_tables + block] * shape.block_width + offset * shape.token_width
    sampled = np.array([end - 1 for end, row in zip(ends.tolist(), rows, strict=True) if row.sample], np.int32)
    num_single = plan.num_decodes if tiled else len(tokens)
    return Batch(
        tokens=tokens,
        positions=positions.astype(np.int32),
        slots=slots,
        tables=token_tables.astype(np.int32),
        blocks=blocks.astype(np.int32),
        num_single=num_single,
        tiles=_tiles(rows[plan.num_decodes :], num_single) if tiled else np.empty((0, 2), np.int32),
        sampled=sampled,
        scored=indices(rows).astype(np.int32) if any(row.scored for row in rows) else _NONE,
    )


def _tokens(row: Row) -> list[int]:
    return row.request.tokens[row.start : row.start + row.count]


def _tiles(rows: list[Row], first: int) -> Ints:
    """Return the tiles of the chunks `rows`; the first token of these rows is token `first` of the batch."""
    tiles = []
    for row in rows:
        tiles += [(first + i, min(TILE_QUERIES, row.count - i)) for i in range(0, row.count, TILE_QUERIES)]
        first += row.count
    return np.array(tiles, np.int32).reshape(-1, 2)
