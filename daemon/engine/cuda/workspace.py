"""Bytes of workspace that FlashInfer's plans need. Pure.

The arithmetic is that of `PrefillPlan` and `PrefillSM90Plan` in FlashInfer's scheduler.cuh. A plan that needs more
than it gets raises an error. `tests/gpu/test_gpu_plans.py` compares these figures with those of real plans.
"""

from __future__ import annotations

from typing import NamedTuple

_FLOAT = _INT = 4  # bytes
_ALIGNMENT = 16  # bytes, of each array in a workspace
_SMALLEST_FA3_TILE = 128  # tokens
_FA3_ARRAYS = 7  # numbers for each piece of work


class HeadShape(NamedTuple):
    """Shape of the heads and of a KV block."""

    heads: int
    kv_heads: int
    head_dim: int
    block_size: int

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.heads // self.kv_heads


class Workspace(NamedTuple):
    """Bytes for the partial results of split sequences, and bytes for a schedule."""

    floats: int
    ints: int


def decode_workspace(shape: HeadShape, *, rows: int, blocks_at_once: int) -> Workspace:
    """Return what a graph plan of at most `rows` decodes needs.

    `blocks_at_once`: thread blocks that FlashInfer counts on the device. Such a plan always has room for split
    sequences, and into how many parts they are split changes nothing.
    """
    tile = _tile_rows(shape.group, shape.head_dim)
    tiles = max(blocks_at_once // shape.kv_heads, _ceil(rows * shape.group, tile) + rows - 1)
    return Workspace(_partial_results(shape, tiles, tile), _schedule(tiles, rows, rows))


def chunk_workspace(shape: HeadShape, *, rows: int, tokens: int, blocks_at_once: int) -> Workspace:
    """Return what the plan of at most `rows` chunks with at most `tokens` tokens together needs, outside of graphs.

    Such a plan splits sequences only while all tiles are on the device at once.
    """
    parts = blocks_at_once // shape.kv_heads
    packed = tokens * shape.group
    tiles = max(parts, _ceil(packed, _tile_rows(0, shape.head_dim)) + rows)
    floats = _partial_results(shape, parts, _tile_rows(packed, shape.head_dim))
    return Workspace(floats, max(_schedule(tiles, rows, tokens), _fa3_schedule(shape, rows, tokens, blocks_at_once)))


def _tile_rows(packed_rows: int, head_dim: int) -> int:
    """Return the rows of a tile. `packed_rows`: of a request on average, one for each token and head of the group."""
    if packed_rows > 64 and head_dim < 256:
        return 128
    return 64 if packed_rows > 16 else 16


def _partial_results(shape: HeadShape, tiles: int, tile_rows: int) -> int:
    """Return the bytes of the output of each tile, and of the sum of its weights, for each query head."""
    return shape.heads * tiles * tile_rows * (shape.head_dim + 1) * _FLOAT


def _schedule(tiles: int, rows: int, tokens: int) -> int:
    arrays = [tiles * _INT] * 3  # request, part of its queries, part of its KV
    arrays += [(rows + 1) * _INT, _INT, _INT, (tokens + 1) * _INT, tiles]
    return sum(map(_aligned, arrays))


def _fa3_schedule(shape: HeadShape, rows: int, tokens: int, blocks_at_once: int) -> int:
    pieces = shape.heads * (_ceil(tokens, _SMALLEST_FA3_TILE) + rows)
    return _FA3_ARRAYS * _aligned(pieces * _INT) + _aligned((blocks_at_once + 1) * _INT)


def _aligned(nbytes: int) -> int:
    return _ceil(nbytes, _ALIGNMENT) * _ALIGNMENT


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
