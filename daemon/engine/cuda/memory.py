"""How many KV blocks a device holds beside the model. Pure."""

from __future__ import annotations

from daemon.models.model_config import ModelError

LEAST_BLOCKS = 2  # the dummy and one to use

_GIB = 1 << 30
_GRAPH_BYTES = 16 << 20


def pool_blocks(free_bytes: int, *, weights: int, activation_peak: int, reserve: int, block_bytes: int) -> int:
    """Blocks of `block_bytes` that fit into `free_bytes`, the dummy among them.

    `free_bytes`: what the engine may use, before anything is loaded. `weights` stay; `activation_peak` is
    the most that a step needs beside weights and pool; `reserve` is left alone. Raises ModelError below LEAST_BLOCKS.
    """
    left = free_bytes - weights - activation_peak - reserve
    blocks = max(0, left) // block_bytes
    if blocks < LEAST_BLOCKS:
        raise ModelError(
            f"no room for KV: of {_gib(free_bytes)} the weights take {_gib(weights)}, a step {_gib(activation_peak)} "
            f"and {_gib(reserve)} stays free; lower max_batch_tokens or max_num_seqs, or put fewer engines on the "
            "device"
        )
    return blocks


def reserve_bytes(graphs: int, decode_peak: int) -> int:
    """What stays free of the pool: the graphs' own memory (activations of the largest bucket, and what the
    driver keeps for each of `graphs`), cuBLAS's workspaces and the allocator's cut-offs."""
    return _GIB // 2 + decode_peak + graphs * _GRAPH_BYTES


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f} GiB"
