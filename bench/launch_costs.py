"""What the kernels of a step must read, write and compute, estimated from the shapes of their operands. Pure.

The time of a kernel is at least ``max(bytes / bandwidth, FLOP / rate)``. All of this is an estimate: caches, the time
of a launch, and what a kernel reads twice do not count. An operand counts once, unless it is read and written:

- product of x [m, k] and W [n, k]: all operands and the result; 2 m n k FLOP. So also for `gemv`'s products, with
  their norm, residual, and the keys and values that they write
- attention: q, the output, and keys and values of each sequence; 4 FLOP for each query, head, width and key. If
  sequences are read in parts, each part's float32 result is written, and read by the merge kernel
- norm with residual: both are read and written. Append: q, k and v are read and written, and the angles read
- lookups of rows: the rows and the indices. Other operations: all operands and results
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from bench.step_loads import Load

_FLOAT = 4  # bytes
_LOOKUPS = ("aten.embedding", "aten.index_select", "aten.index_copy_")
_GEMV = ("add", "gate", "logits", "heads")  # functions of our module of products for few rows


class Operand(NamedTuple):
    """A tensor: its shape, the bytes of an entry, and its address. A result at the address of an operand is the same
    tensor."""

    shape: tuple[int, ...]
    itemsize: int
    address: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.itemsize


class Launch(NamedTuple):
    """`kind`: "kernel", "copy" or "fill". `name`: of the kernel; `nbytes`: of the copy or fill."""

    kind: str
    name: str
    nbytes: int


class Call(NamedTuple):
    """A call and its launches. `name`: "aten." and the operation, or the module's function. `captured`: the launches
    are nodes of a graph."""

    name: str
    operands: tuple[Operand, ...]
    results: tuple[Operand, ...]
    launches: tuple[Launch, ...]
    captured: bool


class Cost(NamedTuple):
    """Bytes read and written, and floating-point operations."""

    nbytes: float
    flop: float = 0.0

    def seconds(self, bandwidth: float, rate: float) -> float:
        """Return the least seconds at `bandwidth` bytes/s and `rate` FLOP/s."""
        return max(self.nbytes / bandwidth, self.flop / rate)


def costs(call: Call, load: Load, blocks_at_once: int) -> list[Cost]:
    """Return the cost of each launch of `call`. `blocks_at_once`: how many thread blocks FlashInfer's plan counts."""
    if call.name == "paged_run":
        attention, merge = _attention(call, load, blocks_at_once)
        return [merge if "MergeStates" in launch.name else attention for launch in call.launches]
    # An operation with several kernels: the first one stands for all.
    return [_cost(call), *[Cost(0.0)] * (len(call.launches) - 1)]


def _cost(call: Call) -> Cost:
    operands = (*call.operands, *call.results)
    if call.launches[0].kind != "kernel":
        return Cost(sum(launch.nbytes for launch in call.launches))
    if call.name in _GEMV:
        return _gemv(call)
    if is_product(call):
        return Cost(_distinct(operands), 2.0 * math.prod(weight_of(call).shape) * _rows(call))
    if call.name in _LOOKUPS:
        rows, index = call.operands[-1] if call.name == "aten.index_copy_" else call.results[0], call.operands[1]
        return Cost(2 * rows.nbytes + index.nbytes)
    return Cost(_distinct(operands) + _twice(call))


def _twice(call: Call) -> int:
    """Return the bytes of the operands that an operation reads and writes, less those of operands that it does not
    read as a whole."""
    if call.name == "append":  # of the pools, the table of blocks and the angles it touches a row for each token
        q, k, v, *others = call.operands
        rows = q.shape[0] * _row_bytes(others[-1])
        return q.nbytes + k.nbytes + v.nbytes + rows - _distinct(others)
    if call.name == "fused_add_rmsnorm":
        return call.operands[0].nbytes + call.operands[1].nbytes
    in_place = call.name.endswith("_") and call.name != "aten.copy_"
    return call.operands[0].nbytes if in_place and call.operands else 0


def is_product(call: Call) -> bool:
    """Return True if the call is a matrix product of PyTorch or cuBLAS."""
    return call.launches[0].name.startswith("cublas") or call.name in ("aten.linear", "aten.mm", "aten.addmm")


def weight_of(call: Call) -> Operand:
    """Return the largest matrix among the operands of a product."""
    return max((o for o in call.operands if len(o.shape) == 2), key=lambda operand: operand.nbytes)


def _rows(call: Call) -> int:
    """Return the rows of a product's other factor: the second largest dimension tells which matrix it is."""
    weight = weight_of(call)
    factor = next(o for o in call.operands if o is not weight and len(o.shape) >= 2 and o.shape[-1] in weight.shape)
    return math.prod(factor.shape[:-1])


def _gemv(call: Call) -> Cost:
    weight = weight_of(call)
    rows = call.operands[0].shape[0]
    flop = 2.0 * rows * math.prod(weight.shape)
    if call.name == "heads":  # of the pools, the angles and the block table only a row of each is touched
        x, norm, *_ = call.operands
        return Cost(weight.nbytes + x.nbytes + norm.nbytes + rows * weight.shape[0] * x.itemsize, flop)
    read_and_written = call.operands[-1].nbytes if call.name == "add" else 0
    return Cost(_distinct(call.operands) + read_and_written, flop)


def _attention(call: Call, load: Load, blocks_at_once: int) -> tuple[Cost, Cost]:
    """Return the costs of the attention kernel and of the kernel that merges its parts."""
    q, keys = call.operands[2], call.operands[3]
    rows, heads, width = q.shape
    block_size, kv_heads = keys.shape[1], keys.shape[2]
    decodes = load.decodes if rows in (load.decodes, load.decodes + load.chunk) else 0
    chunk = load.chunk if rows in (load.chunk, load.decodes + load.chunk) else 0
    tokens = decodes * load.context + chunk
    pairs = decodes * load.context + chunk * (chunk + 1) // 2
    pages = -(-load.context // block_size) * decodes + -(-chunk // block_size)
    merged = any("MergeStates" in launch.name for launch in call.launches)
    parts = max(decodes + chunk, min(blocks_at_once // kv_heads, pages)) if merged else 0
    partial = parts * heads * (width + 1) * _FLOAT
    kv = 2 * tokens * kv_heads * width * keys.itemsize
    attention = Cost(2 * q.nbytes + kv, 4.0 * pairs * heads * width)
    if not merged:
        return attention, Cost(0.0)
    return attention._replace(nbytes=q.nbytes + kv + partial), Cost(partial + q.nbytes)


def _distinct(operands: Iterable[Operand]) -> int:
    return sum({(o.address, o.shape): o.nbytes for o in operands}.values())


def _row_bytes(operand: Operand) -> int:
    return operand.nbytes // operand.shape[0]
