"""Times of single kernels of a decode step and of a prefill chunk, at the shapes of the 8B model.

Each call is captured many times in one CUDA graph, over inputs that together are larger than the L2 cache. So the
times hold no launch from Python and no cache hit that a real step would not have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F

from bench.attention_pass import PassDriver, Span
from bench.gpu_steps import fill_with_noise
from daemon.engine.cuda.attention import FlashInferAttention
from daemon.engine.cuda.ops import FlashInferOps
from daemon.engine.cuda.workspace import HeadShape
from daemon.models.model_config import ModelConfig

Plan = Literal["graph", "plain"]
Call = Callable[[], Any]

_CACHE_BYTES = 400 << 20  # several times the L2 cache
_ROUNDS = 3
_REPLAYS = 5  # per round


class KernelTime(NamedTuple):
    """Microseconds of one call. `nbytes`: the least that it must read and write. `flop`: of its products."""

    what: str
    us: float
    nbytes: float
    flop: float = 0.0

    @property
    def terabytes(self) -> float:
        """TB/s"""
        return self.nbytes / self.us / 1e6

    @property
    def teraflops(self) -> float:
        """TFLOP/s"""
        return self.flop / self.us / 1e6


def microseconds(calls: Sequence[Call]) -> float:
    """Return the least microseconds of a call, with all `calls` captured one behind the other."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:  # libraries initialise themselves in their first calls
            call()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return min(_replay(graph, stream) for _ in range(_ROUNDS)) * 1e3 / len(calls)


def _replay(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> float:
    """Return the milliseconds of one replay."""
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.stream(stream):
        graph.replay()
        began.record()
        for _ in range(_REPLAYS):
            graph.replay()
        ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / _REPLAYS


@torch.inference_mode()
def small_kernels(config: ModelConfig, device: str, rows: Sequence[int]) -> Iterator[KernelTime]:
    """Measure the kernels between products: norm with the residual added, and SiLU with its product."""
    ops, weight = (
        FlashInferOps(torch.device(device)),
        torch.ones(config.hidden_size, device=device, dtype=torch.bfloat16),
    )
    hidden, width = config.hidden_size, config.intermediate_size
    for m in rows:
        copies = max(1, min(64, _CACHE_BYTES // (4 * m * width)))
        x, residual = (_random(m, hidden, device) for _ in range(2))
        wide = [_random(m, 2 * width, device) for _ in range(copies)]
        gated = _random(m, width, device)
        norm = microseconds([partial(ops.add_rms_norm, x, residual, weight, config.rms_norm_eps)] * 16)
        yield KernelTime(f"add and norm, {m} rows", norm, 8.0 * m * hidden)
        silu = microseconds([partial(ops.silu_mul, one, gated) for one in wide] * max(1, 16 // copies))
        yield KernelTime(f"silu and product, {m} rows", silu, 6.0 * m * width)


@torch.inference_mode()
def products(config: ModelConfig, device: str, rows: Sequence[int]) -> Iterator[KernelTime]:
    """Measure each product of a layer and the output layer, by cuBLAS and by cuBLASLt."""
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, width = config.hidden_size, config.intermediate_size
    shapes = {
        "qkv": (q + 2 * kv, hidden),
        "out": (hidden, q),
        "gate_up": (2 * width, hidden),
        "down": (hidden, width),
        "head": (config.vocab_size, hidden),
    }
    for name, (n, k) in shapes.items():
        weights = [_random(n, k, device) for _ in range(max(1, _CACHE_BYTES // (2 * n * k)))]
        for m in rows:
            for library in ("cublas", "cublaslt"):
                torch.backends.cuda.preferred_blas_library(library)
                calls = [_product(_random(m, k, device), weight, wide=name == "head") for weight in weights]
                us = microseconds(calls * max(1, 8 // len(calls)))
                yield KernelTime(f"{name}, {m} rows, {library}", us, 2.0 * n * k, 2.0 * m * n * k)
        del weights
    torch.backends.cuda.preferred_blas_library("default")


def _product(x: torch.Tensor, weight: torch.Tensor, *, wide: bool) -> Call:
    if not wide:
        return partial(F.linear, x, weight)
    out = torch.empty(len(x), len(weight), dtype=torch.float32, device=x.device)
    return partial(torch.mm, x, weight.t(), out_dtype=torch.float32, out=out)


class AttentionCase(NamedTuple):
    """One measurement of decode attention. `layers`: of the pool; 1 shows what the pool's strides cost."""

    contexts: Sequence[int]
    layers: int
    block_size: int = 16
    kv_dtype: torch.dtype = torch.bfloat16
    plan: Plan = "graph"

    def __str__(self) -> str:
        longest, rest = max(self.contexts), min(self.contexts)
        lengths = f"{rest}" if longest == rest else f"{rest} and one {longest}"
        dtype = str(self.kv_dtype).removeprefix("torch.")
        return f"{len(self.contexts)} x {lengths}, page {self.block_size}, {dtype}, {self.layers} layers, {self.plan}"


def attention_cases(context: int, batches: Sequence[int], layers: int) -> list[AttentionCase]:
    """Return the measurements: each batch, its alternatives, and one long sequence among short ones."""
    cases = [AttentionCase([context] * batch, layers) for batch in batches]
    for batch in batches[1:]:
        cases.append(AttentionCase([context] * batch, layers, plan="plain"))
        cases.append(AttentionCase([context] * batch, 1))
        cases.append(AttentionCase([context] * batch, layers, block_size=32))
        cases.append(AttentionCase([context] * batch, layers, kv_dtype=torch.float8_e4m3fn))
    cases.append(AttentionCase([context] * (batches[1] - 1) + [64 * context], layers))
    cases.append(AttentionCase([64 * context], layers))
    return cases


@torch.inference_mode()
def attention(config: ModelConfig, device: str, case: AttentionCase) -> KernelTime:
    """Measure the decode attention of one layer, every call at another layer of the pool."""
    heads = HeadShape(config.num_heads, config.num_kv_heads, config.head_dim, case.block_size)
    batch, block = len(case.contexts), case.block_size
    blocks = 1 + sum(-(-n // block) for n in case.contexts)
    shape = (blocks, case.layers, 2, block, heads.kv_heads, heads.head_dim)
    pool = torch.empty(shape, dtype=case.kv_dtype, device=device)
    fill_with_noise(pool.view(-1).view(torch.uint8), pool.element_size())
    fast = FlashInferAttention(
        heads,
        dtype=torch.bfloat16,
        kv_dtype=case.kv_dtype,
        device=torch.device(device),
        num_staging_sets=2,
        max_rows=batch,
        max_tokens=16,
    )
    fast.use_pool(pool)
    driver = PassDriver(heads, rows=batch, max_len=max(case.contexts) + block, tokens=16, device=device)
    driver.prepare(fast, batch)
    inputs = driver.plan_decodes(fast, driver.rows([Span(n) for n in case.contexts], blocks), batch)
    if case.plan == "plain":
        _plan_plain(fast, driver, batch)
    q = _random(batch, heads.heads * heads.head_dim, device).view(batch, heads.heads, heads.head_dim)
    out = torch.empty_like(q)
    calls = [partial(fast.attend, i % case.layers, q, inputs, out, decode=True) for i in range(32)]
    read = 2.0 * sum(case.contexts) * heads.kv_heads * heads.head_dim * pool.element_size()
    return KernelTime(str(case), microseconds(calls), read)


def _plan_plain(fast: FlashInferAttention, driver: PassDriver, batch: int) -> None:
    """Plan the same step as without a graph: FlashInfer then splits sequences only if too few fill the device."""
    host = driver.current.decodes.tensors
    wrapper, kind = fast._decode_wrappers[batch], fast._first
    schedule = fast._native_plan(wrapper, kind, kind.decode, host, batch, batch, 0, graph=False, causal=False)
    kind.decode_calls[batch].schedule = schedule
    torch.cuda.synchronize()


def _random(rows: int, columns: int, device: str) -> torch.Tensor:
    return torch.randn(rows, columns, device=device).to(torch.bfloat16)
