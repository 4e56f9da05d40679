"""FlashInfer's kernels and our own on the simulated device: the compiled modules check and launch, this module
computes.

Each function here has the arguments of the module's function, as CPU tensors over the same memory. It reads them when
the stream gets there. Attention follows the schedule that the module's own plan has made, tile by tile. So a schedule
that is missing, overwritten or of another step gives wrong results.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import tvm_ffi

from daemon.engine.cuda.ops import TorchOps
from tests.engine.cuda.host_kernels import HostAppend, HostGemv, HostSilu
from tools.simgpu.build import build_host
from tools.simgpu.device import on_host, submit_computation

_NHD = 0
_CAUSAL = 1
_ALL = 1 << 30
_OPS, _GEMMA_OPS = TorchOps(), TorchOps(1.0)  # the reference


def rmsnorm(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float, *_: Any) -> None:
    out.copy_(_OPS.rms_norm(x, weight, eps))


def fused_add_rmsnorm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, *_: Any) -> None:
    _OPS.add_rms_norm(x, residual, weight, eps)


def gemma_rmsnorm(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float, *_: Any) -> None:
    out.copy_(_GEMMA_OPS.rms_norm(x, weight, eps))


def gemma_fused_add_rmsnorm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, *_: Any
) -> None:
    _GEMMA_OPS.add_rms_norm(x, residual, weight, eps)


def silu_mul(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    _host_silu().silu_mul(gate_up, out)


def gelu_tanh_mul(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    _host_silu().gelu_tanh_mul(gate_up, out)


class Plan(NamedTuple):
    """A schedule of FlashInfer's fa2 prefill kernels, in the order of its plan info. Offsets are in bytes."""

    tiles: int  # padding included
    rows: int
    rows_offset: int
    tile_rows: int
    requests_offset: int
    q_tiles_offset: int
    kv_tiles_offset: int
    merge_offset: int
    o_offset: int
    kv_chunk_offset: int
    v_offset: int
    s_offset: int
    valid_offset: int
    graph: int
    split: int


class Tile(NamedTuple):
    """The work of one thread block: some rows of a request and a part of its KV.

    A row is a token and one of the query heads that share a KV head. The ends may be past those of the request.
    """

    request: int
    first: int
    end: int
    first_kv: int
    end_kv: int


def tiles_of(plan: Plan, schedule: torch.Tensor) -> list[Tile]:
    """Read the tiles from the schedule, as the kernel does."""

    def read(offset: int, count: int, dtype: torch.dtype) -> list[int]:
        values: list[int] = schedule[offset : offset + count * dtype.itemsize].view(dtype).tolist()
        return values

    requests, q_tiles, kv_tiles = (
        read(offset, plan.tiles, torch.int32)
        for offset in (plan.requests_offset, plan.q_tiles_offset, plan.kv_tiles_offset)
    )
    firsts = [tile * plan.tile_rows for tile in q_tiles]
    ends = [first + plan.tile_rows for first in firsts]
    if not plan.split:
        return [Tile(r, first, end, 0, _ALL) for r, first, end in zip(requests, firsts, ends, strict=True)]
    [chunk] = read(plan.kv_chunk_offset, 1, torch.int32)
    valid = read(plan.valid_offset, plan.tiles, torch.bool)
    return [
        Tile(r, first, end, k * chunk, (k + 1) * chunk)
        for r, first, end, k, v in zip(requests, firsts, ends, kv_tiles, valid, strict=True)
        if v
    ]


class Paged(NamedTuple):
    """Queries of a batch, and the KV of their sequences in a paged pool."""

    q: torch.Tensor  # [tokens, heads, head_dim]
    keys: torch.Tensor  # [pages, page_size, kv_heads, head_dim]
    values: torch.Tensor
    qo_indptr: torch.Tensor
    kv_indptr: torch.Tensor
    kv_indices: torch.Tensor
    last_page_len: torch.Tensor

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.keys.shape[2]

    def rows(self, tile: Tile) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the token, and the head in its group, of each row of a tile."""
        begin, stop = int(self.qo_indptr[tile.request]), int(self.qo_indptr[tile.request + 1])
        packed = torch.arange(tile.first, min(tile.end, (stop - begin) * self.group))
        return begin + packed // self.group, packed % self.group

    def length(self, request: int) -> int:
        pages = int(self.kv_indptr[request + 1] - self.kv_indptr[request])
        return (pages - 1) * self.keys.shape[1] + int(self.last_page_len[request])

    def kv(self, request: int, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values [wanted, kv_heads, head_dim] of a sequence at the positions `wanted`."""
        pages = self.kv_indices[int(self.kv_indptr[request]) : int(self.kv_indptr[request + 1])].long()
        at = pages[wanted // self.keys.shape[1]], wanted % self.keys.shape[1]
        return self.keys[at].float(), self.values[at].float()


def paged_run(_floats: torch.Tensor, schedule: torch.Tensor, info: Any, *more: Any) -> None:
    batch, (out, _lse, mask, layout, window), rest = Paged(*more[:7]), more[7:12], more[12:]
    assert layout == _NHD
    cap, scale = [x for x in rest if isinstance(x, float)][:2]
    scoring = Scoring(scale, cap, window, mask == _CAUSAL)
    # Only the schedules of the fa2 kernels are read.
    tiles = (
        tiles_of(Plan(*map(int, info)), schedule)
        if len(info) == len(Plan._fields)
        else [Tile(request, 0, _ALL, 0, _ALL) for request in range(len(batch.last_page_len))]
    )
    partial = Partial(*batch.q.shape)
    for tile in tiles:
        _attend(batch, tile, partial, scoring)
    out.copy_(partial.total())


class Scoring(NamedTuple):
    scale: float
    cap: float  # 0: none
    window: int  # keys that a token sees before its own; -1: all
    causal: bool


def _attend(batch: Paged, tile: Tile, partial: Partial, scoring: Scoring) -> None:
    rows, heads = batch.rows(tile)
    length, stop = batch.length(tile.request), int(batch.qo_indptr[tile.request + 1])
    # With a window, the parts of the KV begin where the first row's window begins.
    first = max(0, length - stop + int(rows[0]) - scoring.window) if len(rows) and scoring.window >= 0 else 0
    wanted = torch.arange(min(first + tile.first_kv, length), min(first + tile.end_kv, length))
    if not len(rows) or not len(wanted):
        return
    positions = length - stop + rows
    hidden = wanted > (positions if scoring.causal else torch.full_like(rows, length))[:, None]
    if scoring.window >= 0:
        hidden |= wanted < (positions - scoring.window)[:, None]
    keys, values = batch.kv(tile.request, wanted)
    for kv_head in range(keys.shape[1]):
        at = rows, kv_head * batch.group + heads
        scores = batch.q[at].float() @ keys[:, kv_head].T * scoring.scale
        if scoring.cap:
            scores = scoring.cap * torch.tanh(scores / scoring.cap)
        partial.merge(at, scores.masked_fill(hidden, -torch.inf), values[:, kv_head])


class Partial:
    """Attention over parts of the keys, merged one by one. Rows that no part has covered become NaN."""

    def __init__(self, rows: int, heads: int, head_dim: int) -> None:
        self._largest = torch.full((rows, heads), -torch.inf)
        self._weight = torch.zeros(rows, heads)
        self._value = torch.zeros(rows, heads, head_dim)

    def merge(self, at: tuple[torch.Tensor, torch.Tensor], scores: torch.Tensor, v: torch.Tensor) -> None:
        """`at`: token and head of each row of `scores` [rows, keys]."""
        largest = torch.maximum(self._largest[at], scores.amax(-1))
        base = largest.clamp(min=torch.finfo(torch.float32).min)  # while all keys are hidden
        weights, shrink = torch.exp(scores - base[:, None]), torch.exp(self._largest[at] - base)
        self._value[at] = self._value[at] * shrink[:, None] + weights @ v
        self._weight[at] = self._weight[at] * shrink + weights.sum(-1)
        self._largest[at] = largest

    def total(self) -> torch.Tensor:
        return self._value / self._weight[..., None]


def draw(logits: torch.Tensor, *more: torch.Tensor) -> None:
    """Sample by the kernel's own row algorithm."""
    rows, vocab = logits.shape
    logits = logits.contiguous()
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in more]
    _host_draw().draw_rows(
        ctypes.c_void_p(logits.data_ptr()),
        ctypes.c_int64(rows),
        ctypes.c_int64(vocab),
        *pointers,
        ctypes.c_uint32(1),
        ctypes.c_uint32(1),
    )


@lru_cache
def _host_draw() -> ctypes.CDLL:
    return ctypes.CDLL(str(build_host("draw")))


@lru_cache
def _host_gemv() -> HostGemv:
    return HostGemv(build_host("gemv"))


@lru_cache
def _host_append() -> HostAppend:
    return HostAppend(build_host("append"))


@lru_cache
def _host_silu() -> HostSilu:
    return HostSilu(build_host("silu"))


def append(*args: Any) -> None:
    """This function and the next four compute by the kernel's own algorithm."""
    _host_append().append(*args)


def add(*args: Any) -> None:
    _host_gemv().add(*args)


def gate(*args: Any) -> None:
    _host_gemv().gate(*args)


def logits(*args: Any) -> None:
    _host_gemv().logits(*args)


def heads(*args: Any) -> None:
    _host_gemv().heads(*args)


_COMPUTATIONS: dict[str, Callable[..., None]] = {
    f.__name__: f
    for f in (
        rmsnorm,
        fused_add_rmsnorm,
        gemma_rmsnorm,
        gemma_fused_add_rmsnorm,
        silu_mul,
        gelu_tanh_mul,
        paged_run,
        draw,
        append,
        add,
        gate,
        logits,
        heads,
    )
}
_HOST_FUNCTIONS = ("plan",)  # they compute on the host, unchanged


class Module:
    """A compiled module. After each launch the result of its kernel is computed."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._module, name)
        if name in _HOST_FUNCTIONS:
            return function

        def call(*args: Any) -> Any:
            if name not in _COMPUTATIONS:
                raise NotImplementedError(f"simgpu: {name} is not simulated")
            result = function(*args)
            tensors = [on_host(a) if isinstance(a, torch.Tensor) else a for a in args]
            device = next(a.device for a in args if isinstance(a, torch.Tensor) and a.is_cuda)
            submit_computation(lambda: _COMPUTATIONS[name](*tensors), device)
            return result

        return call


def install() -> None:
    """Simulate the modules that tvm-ffi loads from now on."""
    load = tvm_ffi.load_module

    def load_module(path: Any, *args: Any, **kwargs: Any) -> Any:
        return Module(load(path, *args, **kwargs))

    tvm_ffi.load_module = load_module
