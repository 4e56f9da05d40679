"""Number of KV blocks that fit on a device beside the model, and why none fits. Pure."""

from __future__ import annotations

from typing import NamedTuple

from daemon.engine.runner import Unavailable
from daemon.models.model_config import ModelError

MIN_BLOCKS = 2  # the dummy and one that requests can use

_GIB = 1 << 30
_GRAPH_BYTES = 16 << 20
_OTHERS = "other processes hold memory of the device, `nvidia-smi` lists them"


class DeviceMemory(NamedTuple):
    """Bytes of a device's memory for one engine."""

    free: int  # that no other process holds now: what is free, and what the engine has already
    share: int  # that the engine may use at most, by `memory_share`


def pool_blocks(
    memory: DeviceMemory, *, weights: int, activation_peak: int, reserve: int, block_bytes: int, wanted: int = 0
) -> int:
    """Return the number of blocks of `block_bytes` that fit, including the dummy.

    `weights`: memory that stays allocated. `activation_peak`: the most that a step needs beside weights and pool.
    `reserve`: memory that stays free. `wanted`: bytes of the pool; 0: as many as fit. Raises ModelError if the
    engine's share does not suffice, whatever is free, and Unavailable if only too little is free now.
    """
    beside = weights + activation_peak + reserve
    needed = beside + max(MIN_BLOCKS * block_bytes, wanted)
    what = f"no room for a kv_memory of {_gib(wanted)}" if wanted else "no room for KV"
    parts = f"the weights take {_gib(weights)}, a step {_gib(activation_peak)} and {_gib(reserve)} stays free"
    if needed > memory.share:
        raise ModelError(
            f"{what}: memory_share leaves {_gib(memory.share)} to this engine, {parts}: "
            f"{_gib(needed - memory.share)} too little; lower max_batch_tokens, max_num_seqs or kv_memory, raise "
            "memory_share, or put fewer engines on the device"
        )
    if needed > memory.free:
        raise Unavailable(
            f"{what} at this time: {_OTHERS}, {_gib(memory.free)} are left, {parts}: "
            f"{_gib(needed - memory.free)} too little"
        )
    return (wanted or min(memory) - beside) // block_bytes


def out_of_memory(memory: DeviceMemory, weights: int) -> ModelError | Unavailable:
    """Return the error for an engine that could not even load. `weights`: bytes of the model's weights."""
    if weights > memory.share or memory.free >= memory.share:
        return ModelError(
            f"the model does not fit: its weights take {_gib(weights)}, memory_share leaves {_gib(memory.share)} to "
            "this engine, and a step needs more beside them; lower max_batch_tokens or max_num_seqs, or put fewer "
            "engines on the device"
        )
    return Unavailable(
        f"the model does not fit at this time: {_OTHERS}, {_gib(memory.free)} are left, "
        f"{_gib(memory.share - memory.free)} less than memory_share allows"
    )


def reserve_bytes(graphs: int, decode_peak: int) -> int:
    """Return the bytes that stay free beside the pool.

    They are for the graphs (activations of the largest bucket, and the driver's memory for each of `graphs`), for
    cuBLAS's workspaces and for the allocator's fragmentation.
    """
    return _GIB // 2 + decode_peak + graphs * _GRAPH_BYTES


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f} GiB"
