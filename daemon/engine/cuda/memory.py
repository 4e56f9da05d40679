"""Number of KV blocks that fit on a device beside the model. Pure."""

from __future__ import annotations

from daemon.models.model_config import ModelError

MIN_BLOCKS = 2  # the dummy and one that requests can use

_GIB = 1 << 30
_GRAPH_BYTES = 16 << 20


def pool_blocks(free_bytes: int, *, weights: int, activation_peak: int, reserve: int, block_bytes: int) -> int:
    """Return the number of blocks of `block_bytes` that fit into `free_bytes`, including the dummy.

    `free_bytes`: memory that the engine may use, before anything is loaded. `weights`: memory that stays allocated.
    `activation_peak`: the most that a step needs beside weights and pool. `reserve`: memory that stays free. Raises
    ModelError below MIN_BLOCKS.
    """
    left = free_bytes - weights - activation_peak - reserve
    blocks = max(0, left) // block_bytes
    if blocks < MIN_BLOCKS:
        raise ModelError(
            f"no room for KV: of {_gib(free_bytes)} the weights take {_gib(weights)}, a step {_gib(activation_peak)} "
            f"and {_gib(reserve)} stays free; lower max_batch_tokens or max_num_seqs, or put fewer engines on the "
            "device"
        )
    return blocks


def reserve_bytes(graphs: int, decode_peak: int) -> int:
    """Return the bytes that stay free beside the pool.

    They are for the graphs (activations of the largest bucket, and the driver's memory for each of `graphs`), for
    cuBLAS's workspaces and for the allocator's fragmentation.
    """
    return _GIB // 2 + decode_peak + graphs * _GRAPH_BYTES


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f} GiB"
