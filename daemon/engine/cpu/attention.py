"""Paged attention on the CPU: one kernel for single tokens, one for prefill chunks.

Both read a sequence's blocks in groups of fixed size from position 0, or from the group in which a sliding window
begins, with an online softmax. The query heads of a KV head's group share each key and value that is read. Queries
are scaled by LOG2E and the model's scale beforehand, so the softmax uses powers of 2. A token's result in
`attend_tokens` depends only on its own sequence, bit for bit: deterministic engines use that kernel for prefill too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from daemon.engine.cpu.ops import exp2_nonpositive, narrow, widen
from daemon.engine.cpu.simd import dots, multiply, prefetch, width
from daemon.engine.jit import F32, kernel, log_first_use, prange

TILE_QUERIES = 32  # tokens of a prefill chunk that share one pass over the keys
_ROWS = 4  # rows of one product in `attend_tiles`
_SPAN = 64  # positions of one softmax step; a larger block is one step
LOG2E = 1.4426950408889634
_LOWEST = np.float32(-1e30)  # used as minus infinity: differences of it stay finite


class AttentionShape(NamedTuple):
    """The compile-time constants of the kernels."""

    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    layers: int

    @property
    def token_width(self) -> int:
        """Pool elements from a token's key to the next token's key."""
        return self.kv_heads * self.head_dim

    @property
    def value_offset(self) -> int:
        """Pool elements from a token's key to its value."""
        return self.block_size * self.token_width

    @property
    def layer_width(self) -> int:
        """Pool elements of one layer in a block."""
        return 2 * self.value_offset

    @property
    def block_width(self) -> int:
        """Pool elements of a block."""
        return self.layers * self.layer_width


class Attention(NamedTuple):
    """The compiled kernels.

    attend_tokens(q, pool, layer_offset, window, positions, tables, blocks, out) computes out[i] for each i of
    `positions`. attend_tiles(q, pool, layer_offset, window, positions, tables, blocks, tiles, out) computes `out` for
    the tokens of each tile, which are consecutive tokens of one sequence: tiles [n, 2] int32 of (first token,
    count <= TILE_QUERIES). `window`: of a kernel with a sliding window, see `LayerConfig`; others do not read it.

    q [tokens, heads * head_dim] f32; pool flat; positions [tokens] int32; tables [tokens] int32: index in `blocks`
    (int32) where the token's block table begins; out [tokens, heads * head_dim] f32 or bf16 bits.
    """

    attend_tokens: Callable[..., None]
    attend_tiles: Callable[..., None]


def compile_attention(
    shape: AttentionShape, parallel: bool, *, windowed: bool = False, softcap: float = 0.0
) -> Attention:
    """Compile the kernels for one model's shape. `parallel`: they divide the work between numba's threads.

    `windowed`: with a sliding window. `softcap`: see `ModelConfig`.
    """
    kind = windowed, float(softcap * LOG2E)
    log_first_use("models of this shape", (*shape, parallel, *kind))
    return Attention(_compile_tokens(shape, parallel, *kind), _compile_tiles(shape, parallel, *kind))


@kernel(inline=True, fastmath=True)
def _cap(scores: Any, count: int, limit: F32) -> None:
    """Replace the first `count` scores by ``limit * tanh(score / limit)``. Scores and limit are in base 2."""
    factor = np.float32(-2.0 * 1.4426950408889634) / limit
    for t in range(count):
        x = scores[t]
        e = exp2_nonpositive(abs(x) * factor)
        size = limit * np.divide(np.float32(1.0) - e, np.float32(1.0) + e)
        scores[t] = size if x >= 0 else -size


@kernel(inline=True, fastmath=True)
def _weigh(scores: Any, count: int, before: F32, sums: Any) -> tuple[F32, F32, F32]:
    """Do one step of a row's online softmax: replace its first `count` scores by weights and rescale `sums`.

    `before` is the row's largest score of the earlier steps. Returns (the largest score now, the factor that `sums`
    was multiplied by, the sum of the weights).
    """
    largest = before
    for t in range(count):
        largest = max(largest, scores[t])
    shrink = exp2_nonpositive(before - largest)
    added = np.float32(0.0)
    for t in range(count):
        weight = exp2_nonpositive(scores[t] - largest)
        scores[t] = weight
        added += weight
    for j in range(sums.shape[0]):
        sums[j] *= shrink
    return largest, shrink, added


@kernel(inline=True, fastmath=True)
def _finish(sums: Any, total: F32, out: Any) -> None:
    """Write one head's result: its weighted sum of values divided by the sum of the weights."""
    scale = np.float32(1.0) / total
    for j in range(sums.shape[0]):
        out[j] = narrow(sums[j] * scale, out)


@kernel(inline=True, fastmath=True)
def _copy_transposed(source: Any, out: Any, column: int) -> None:
    for j in range(source.shape[0]):
        out[j, column] = widen(source[j])


@kernel(inline=True, fastmath=True)
def _copy(source: Any, out: Any) -> None:
    for j in range(source.shape[0]):
        out[j] = widen(source[j])


def _compile_tokens(shape: AttentionShape, parallel: bool, windowed: bool, softcap: float) -> Callable[..., None]:
    heads, kv_heads, dim, block_size, _ = shape
    group = heads // kv_heads
    token_width, value_offset, block_width = shape.token_width, shape.value_offset, shape.block_width
    span = max(_SPAN, block_size)
    capped, limit = softcap > 0, np.float32(softcap)

    @kernel(fastmath=True, parallel=parallel)
    def attend_tokens(
        q: Any, pool: Any, layer_offset: int, window: int, positions: Any, tables: Any, blocks: Any, out: Any
    ) -> None:
        for item in prange(positions.shape[0] * kv_heads):
            r, head = item // kv_heads, item % kv_heads
            origin = layer_offset + head * dim  # in a block: this head's key of the block's first token
            length = positions[r] + 1
            begin = max(0, length - window) if windowed else 0
            last = tables[r] + (length - 1) // block_size
            scores = np.empty((group, span), np.float32)
            sums = np.zeros((group, dim), np.float32)
            largest = np.full(group, _LOWEST)
            total = np.zeros(group, np.float32)
            for first in range(begin // span * span, length, span):
                count = min(span, length - first)
                skip = max(0, begin - first) if windowed else 0
                table = tables[r] + first // block_size
                used = (count + block_size - 1) // block_size
                for b in range(used):
                    at = blocks[table + b] * block_width + origin
                    following = blocks[min(table + b + 1, last)] * block_width + origin
                    prefetch(block_size, dim, pool, at + value_offset, token_width)
                    prefetch(block_size, dim, pool, following, token_width)
                    dots(
                        group,
                        dim,
                        q,
                        (r * heads + head * group) * dim,
                        pool,
                        at,
                        token_width,
                        scores,
                        b * block_size,
                        span,
                        min(block_size, count - b * block_size),
                    )
                for g in range(group):
                    if capped:
                        _cap(scores[g], count, limit)
                    largest[g], shrink, added = _weigh(scores[g, skip:], count - skip, largest[g], sums[g])
                    total[g] = total[g] * shrink + added
                    if windowed:
                        scores[g, :skip] = np.float32(0.0)
                for b in range(used):
                    at = blocks[table + b] * block_width + origin + value_offset
                    multiply(
                        group,
                        dim,
                        1,
                        scores,
                        b * block_size,
                        span,
                        pool,
                        at,
                        token_width,
                        sums,
                        0,
                        dim,
                        min(block_size, count - b * block_size),
                    )
            for g in range(group):
                _finish(sums[g], total[g], out[r, (head * group + g) * dim : (head * group + g + 1) * dim])

    return attend_tokens


def _compile_tiles(shape: AttentionShape, parallel: bool, windowed: bool, softcap: float) -> Callable[..., None]:
    heads, kv_heads, dim, block_size, _ = shape
    group = heads // kv_heads
    token_width, value_offset, block_width = shape.token_width, shape.value_offset, shape.block_width
    span = max(_SPAN, block_size)
    capped, limit = softcap > 0, np.float32(softcap)
    columns = _columns(dim)
    capacity = -(-TILE_QUERIES * group // _ROWS) * _ROWS

    @kernel(fastmath=True, parallel=parallel)
    def attend_tiles(
        q: Any,
        pool: Any,
        layer_offset: int,
        window: int,
        positions: Any,
        tables: Any,
        blocks: Any,
        tiles: Any,
        out: Any,
    ) -> None:
        for item in prange(tiles.shape[0] * kv_heads):
            tile, head = item // kv_heads, item % kv_heads
            begin = tiles[tile, 0]
            rows = tiles[tile, 1] * group  # row r: token r // group, head r % group of this KV head
            start = positions[begin]
            length = start + tiles[tile, 1]
            folded = np.zeros((capacity, dim), np.float32)
            for r in range(rows):
                at = (head * group + r % group) * dim
                folded[r] = q[begin + r // group, at : at + dim]
            keys = np.empty((dim, span), np.float32)
            values = np.empty((span, dim), np.float32)
            scores = np.empty((capacity, span), np.float32)
            sums = np.zeros((capacity, dim), np.float32)
            largest = np.full(capacity, _LOWEST)
            total = np.zeros(capacity, np.float32)
            oldest = max(0, start + 1 - window) if windowed else 0
            for first in range(oldest // span * span, length, span):
                count = min(span, length - first)
                for t in range(count):
                    block = blocks[tables[begin] + (first + t) // block_size]
                    at = block * block_width + layer_offset + (first + t) % block_size * token_width + head * dim
                    _copy_transposed(pool[at : at + dim], keys, t)
                    _copy(pool[at + value_offset : at + value_offset + dim], values[t])
                for r in range(0, rows, _ROWS):
                    for c in range(0, span, _SPAN):
                        multiply(
                            _ROWS, _SPAN, 0, folded, r * dim, dim, keys, c, span, scores, r * span + c, span, dim
                        )
                for r in range(rows):
                    seen = min(count, max(0, start + r // group + 1 - first))
                    skip = min(seen, max(0, start + r // group + 1 - window - first)) if windowed else 0
                    if capped:
                        _cap(scores[r], seen, limit)
                    largest[r], shrink, added = _weigh(scores[r, skip:], seen - skip, largest[r], sums[r])
                    total[r] = total[r] * shrink + added
                    if windowed:
                        scores[r, :skip] = np.float32(0.0)
                    scores[r, seen:count] = np.float32(0.0)
                for r in range(0, rows, _ROWS):
                    for c in range(0, dim, columns):
                        multiply(
                            _ROWS, columns, 1, scores, r * span, span, values, c, dim, sums, r * dim + c, dim, count
                        )
            for r in range(rows):
                at = (head * group + r % group) * dim
                _finish(sums[r], total[r], out[begin + r // group, at : at + dim])

    return attend_tiles


def _columns(dim: int) -> int:
    """Return the columns of a value in one product: whole vectors, a divisor of `dim`, at most 4 registers."""
    lanes = width(dim)
    return max(n * lanes for n in (1, 2, 3, 4) if dim % (n * lanes) == 0)
