"""Attention over the paged pool: by FlashInfer's kernels, which only this file calls, or by torch as the reference.

The pool is blocks-first, `[blocks, layers, 2, block_size, kv_heads, head_dim]`. FlashInfer reads a layer by its
strides: it gets the views ``pool[:, layer, 0]`` and ``pool[:, layer, 1]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from daemon.engine.cuda import kernels
from daemon.engine.cuda.arrays import Inputs, Size
from daemon.engine.cuda.split_kv import part_pages
from daemon.engine.cuda.workspace import HeadShape, chunk_workspace, decode_workspace
from daemon.models.model_config import ModelConfig, ModelError

_PARTS = 0
"""Index in a plan of the number of parts that it has room for."""

_TILE_ROWS = 3
"""Index in a plan of the rows of a tile: a row is a token and one of the query heads that share a KV head."""

_LEAST_PART = 128
"""Tokens of the smallest part of a sequence that FlashInfer gives to a thread block."""

_BLOCKS_PER_MULTIPROCESSOR = 2
"""Thread blocks that FlashInfer's plan puts on a multiprocessor."""

_NOT_CAUSAL, _CAUSAL = 0, 1
_NHD = 0  # layout of the pages: [page_size, kv_heads, head_dim]
_NO_WINDOW = -1


class Scoring(NamedTuple):
    """How a model's attention scores keys, and which ones it sees."""

    scale: float  # of the products of queries and keys
    cap: float = 0.0  # a score becomes cap * tanh(score / cap); 0: it stays
    windows: tuple[int, ...] = ()  # of each layer, see `LayerConfig`; (): no layer has one

    @classmethod
    def of(cls, config: ModelConfig) -> Scoring:
        windows = tuple(layer.window for layer in config.layers)
        return cls(config.query_scale, config.attention_softcap, windows if any(windows) else ())

    @classmethod
    def plain(cls, head_dim: int) -> Scoring:
        """Return that of a Llama."""
        return cls(head_dim**-0.5)


class Attention(Protocol):
    """Attention of a step's rows: the decodes of a prepared bucket, and chunks. A pass has one kind or both."""

    def use_pool(self, pool: torch.Tensor) -> None:
        """Read and write `pool` from now on."""
        ...

    def prepare(self, bucket: int, device: Inputs, host: Inputs) -> None:
        """Prepare decodes of `bucket` rows, which always read the arrays `device`.

        `host`: the same arrays on the host, filled with any valid step.
        """
        ...

    def plan(self, host: Inputs, device: Inputs, size: Size, *, decode: bool, staging_index: int) -> None:
        """Make the schedule of the decodes or of the chunks of the pass that is submitted next.

        `host`, `device`: the inputs as CPU tensors and on the device; for chunks cut to `size`. `staging_index`: the
        set of staging buffers of this step.
        """
        ...

    def pages(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of a layer: views [blocks, block_size, kv_heads, head_dim]."""
        ...

    def attend(self, layer: int, q: torch.Tensor, inputs: Inputs, out: torch.Tensor, *, decode: bool) -> None:
        """Write the attention of q [n, heads, head_dim] to its sequence up to its own position to `out`.

        The KV of that position is already in the pool. `out`: [n, heads, head_dim] in the dtype of q, contiguous; it
        may be a slice of the tokens of a larger tensor.
        """
        ...


class TorchAttention:
    """Attention row by row in float32, from the same arrays that FlashInfer gets. Slow; the reference."""

    def __init__(self, shape: HeadShape, scoring: Scoring | None = None) -> None:
        self._shape = shape
        self._scoring = scoring or Scoring.plain(shape.head_dim)
        self._pool: torch.Tensor

    def use_pool(self, pool: torch.Tensor) -> None:
        self._pool = pool

    def prepare(self, bucket: int, device: Inputs, host: Inputs) -> None:
        """Nothing to prepare."""

    def plan(self, host: Inputs, device: Inputs, size: Size, *, decode: bool, staging_index: int) -> None:
        """Nothing to plan."""

    def pages(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._pool[:, layer, 0], self._pool[:, layer, 1]

    def attend(self, layer: int, q: torch.Tensor, inputs: Inputs, out: torch.Tensor, *, decode: bool) -> None:
        queries, pages = inputs.qo_indptr.tolist(), inputs.kv_indptr.tolist()
        window = self._scoring.windows[layer] if self._scoring.windows else 0
        for row, last in enumerate(inputs.last_page_len.tolist()):
            tokens = slice(queries[row], queries[row + 1])
            blocks = inputs.kv_indices[pages[row] : pages[row + 1]].long()
            length = (len(blocks) - 1) * self._shape.block_size + last
            kv = self._pool[blocks, layer].transpose(0, 1).flatten(1, 2)[:, :length]
            out[tokens] = self._row(q[tokens], kv, window).to(q.dtype)

    def _row(self, q: torch.Tensor, kv: torch.Tensor, window: int) -> torch.Tensor:
        """Return [n, heads, head_dim] float32. q [n, heads, head_dim]: the last tokens of `kv` [2, length, kv_heads,
        head_dim]."""
        count, length = len(q), kv.shape[1]
        k, v = kv.float().repeat_interleave(self._shape.heads // self._shape.kv_heads, dim=2)
        scores = torch.einsum("qhd,khd->hqk", q.float(), k) * self._scoring.scale
        if cap := self._scoring.cap:
            scores = cap * torch.tanh(scores / cap)
        positions = torch.arange(length - count, length, device=q.device)[:, None]
        keys = torch.arange(length, device=q.device)
        hidden = keys > positions
        if window:
            hidden |= keys <= positions - window
        weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1)
        return torch.einsum("hqk,khd->qhd", weights, v)


class FlashInferAttention:
    """Decodes by the tensor-core decode wrapper in graph mode, one wrapper per bucket; chunks by the prefill wrapper.

    The wrapper's own `plan` runs once, to load its module. Afterwards steps call the module's plan directly, with
    arrays that are already on the host and with the step's own pinned buffer. The wrapper's `plan` would compute the
    largest length by Python's `max` over a tensor, and it would overwrite its only pinned buffer while the copy of
    the previous step may still be in flight. All decode schedules share one workspace on the device, and all chunk
    schedules another one: the stream orders them. So a pass can have schedules of decodes and of chunks. All put
    partial results into the same memory: each attention call reads its own before the next one writes.

    A window changes the schedule: long sequences have fewer keys to share out. So layers with different windows have
    schedules, and workspaces for them, of their own. The kernel is the same for all layers of a model: it gets the
    window as an argument.

    The modules' attention is called directly, too. The wrapper's `run` would check its arguments in each layer, and
    the host launches the layers of a pass of chunks one by one: small models wait for it.

    FlashInfer's kernels read schedules, `indptr` arrays and lengths before they wait for the previous kernel (PDL).
    So only copies may write these, never a kernel.
    """

    def __init__(
        self,
        shape: HeadShape,
        *,
        dtype: torch.dtype,
        kv_dtype: torch.dtype,
        device: torch.device,
        num_staging_sets: int,
        max_rows: int,
        max_tokens: int,
        scoring: Scoring | None = None,
        prefill_backend: kernels.Prefill = "fa2",
    ) -> None:
        """`num_staging_sets`: number of staging sets. `max_rows`: of any pass. `max_tokens`: of a pass of chunks.
        `scoring`: None: that of a Llama. `prefill_backend`: "fa2", or "fa3" (only plain scoring, not e4m3 KV).
        """
        import flashinfer

        self._fi: Any = flashinfer
        self._shape = shape
        self._scoring = scoring or Scoring.plain(shape.head_dim)
        self._pdl: bool = flashinfer.utils.device_support_pdl(device)
        backends: tuple[kernels.Prefill, ...] = ("fa2", prefill_backend)
        self._modules = {backend: self._load(backend, dtype, kv_dtype) for backend in backends}
        self._dtypes = {"q_data_type": dtype, "kv_data_type": kv_dtype, "o_data_type": dtype}
        self._backend = prefill_backend
        blocks = _blocks_at_once(device)
        decodes = decode_workspace(shape, rows=max_rows, blocks_at_once=blocks)
        chunks = chunk_workspace(shape, rows=max_rows, tokens=max_tokens, blocks_at_once=blocks)
        self._floats = torch.zeros(max(decodes.floats, chunks.floats), dtype=torch.uint8, device=device)
        self._kinds = {
            window: _Kind(
                window - 1 if window else _NO_WINDOW,
                _PlanBuffers(device, num_staging_sets, decodes.ints),
                _PlanBuffers(device, num_staging_sets, chunks.ints),
            )
            for window in sorted(set(self._scoring.windows or (0,)), reverse=True)
        }
        self._first = next(iter(self._kinds.values()))  # it has a window if any kind has one
        self._decode_wrappers: dict[int, Any] = {}
        self._prefill_wrapper: Any = None
        self._largest_split_by_plan = blocks // shape.kv_heads
        self._layers: list[_LayerViews] = []

    def use_pool(self, pool: torch.Tensor) -> None:
        windows = self._scoring.windows or (0,) * pool.shape[1]
        self._layers = [
            _LayerViews((pool[:, layer, 0], pool[:, layer, 1]), self._kinds[window])
            for layer, window in enumerate(windows)
        ]

    def prepare(self, bucket: int, device: Inputs, host: Inputs) -> None:
        wrapper = self._fi.BatchDecodeWithPagedKVCacheWrapper(
            self._floats,
            kv_layout="NHD",
            use_cuda_graph=True,
            use_tensor_cores=True,
            paged_kv_indptr_buffer=device.kv_indptr[: bucket + 1],
            paged_kv_indices_buffer=device.kv_indices,
            paged_kv_last_page_len_buffer=device.last_page_len[:bucket],
            backend="fa2",
        )
        self._first.decode.attach(wrapper)
        pages = int(host.kv_indptr[bucket])
        self._first_plan(
            wrapper,
            indptr=host.kv_indptr[: bucket + 1],
            indices=host.kv_indices[:pages],
            last_page_len=host.last_page_len[:bucket],
            **self._geometry("head_dim"),
        )
        self._decode_wrappers[bucket] = wrapper
        arrays = (
            wrapper._qo_indptr_buf,
            wrapper._paged_kv_indptr_buf,
            wrapper._paged_kv_indices_buf,
            wrapper._paged_kv_last_page_len_buf,
        )
        for kind in self._kinds.values():
            info = (
                wrapper._plan_info
                if kind is self._first
                else self._native_plan(wrapper, kind, kind.decode, host, bucket, bucket, -1, graph=True, causal=False)
            )
            kind.decode_calls[bucket] = self._call("fa2", kind, kind.decode, info, arrays, _NOT_CAUSAL)
            kind.plans[bucket] = [int(x) for x in info]

    def plan(self, host: Inputs, device: Inputs, size: Size, *, decode: bool, staging_index: int) -> None:
        if not decode and self._prefill_wrapper is None:
            self._prefill_wrapper = self._make_prefill_wrapper(host, size)
        for kind in self._kinds.values():
            if decode:
                self._plan_decode(kind, host, size.rows, staging_index)
            else:
                self._plan_prefill(kind, host, device, size, staging_index)

    def pages(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._layers[layer].pages

    def attend(self, layer: int, q: torch.Tensor, inputs: Inputs, out: torch.Tensor, *, decode: bool) -> None:
        pages, kind = self._layers[layer]
        call = kind.decode_calls[len(q)] if decode else kind.prefill_call
        call.run(q, *pages, out)

    def _load(self, backend: kernels.Prefill, dtype: torch.dtype, kv_dtype: torch.dtype) -> Any:
        return kernels.load_attention(
            backend,
            "bf16" if dtype == torch.bfloat16 else "fp16",
            "auto" if kv_dtype == dtype else "fp8",
            self._shape.head_dim,
            kernels.Scores(any(self._scoring.windows), bool(self._scoring.cap)),
        )

    def _call(
        self,
        backend: kernels.Prefill,
        kind: _Kind,
        buffers: _PlanBuffers,
        schedule: Any,
        arrays: tuple[torch.Tensor, ...],
        mask: int,
    ) -> _AttentionCall:
        """Return the attention of a pass. `schedule`: what the module's plan returned. `arrays`: where queries and
        pages of each sequence are."""
        options: tuple[Any, ...] = (None, mask, _NHD, kind.window_left, self._pdl)  # None: no sums of the weights
        cap, scale = self._scoring.cap, self._scoring.scale
        if backend == "fa2":
            # No mask of our own (2 arguments), no ALiBi, no shared prefixes (3); then cap, scale, rope, prefixes.
            options += (None, None, None, None, None, None, cap, scale, 1.0, 1e-4, 0)
        else:
            # No shared prefixes (3), no scales of the values; then cap, scale, scale of the values, prefixes.
            options += (None, None, None, None, cap, scale, 1.0, 0)
        function = self._modules[backend].paged_run
        return _AttentionCall(function, (self._floats, buffers.workspace), schedule, arrays, options)

    def _first_plan(self, wrapper: Any, **arguments: Any) -> None:
        """Let `wrapper` make its own plan, which also loads its module. Raises ModelError if it lacks workspace."""
        try:
            wrapper.plan(non_blocking=False, **arguments)
        except RuntimeError as e:
            if "workspace" not in str(e):
                raise
            raise ModelError(
                f"FlashInfer {self._fi.__version__} needs a larger workspace than llumd computes for heads of "
                f"{self._shape}: install the version that llumd asks for, or lower max_num_seqs ({e})"
            ) from e

    def _geometry(self, head_dim: str) -> dict[str, Any]:
        """Return the arguments that the plans of both wrappers share. `head_dim`: their name for the head's width."""
        heads, kv_heads, width, block_size = self._shape
        return {
            "num_qo_heads": heads,
            "num_kv_heads": kv_heads,
            head_dim: width,
            "page_size": block_size,
            "window_left": self._first.window_left,
            "logits_soft_cap": self._scoring.cap,
            **self._dtypes,
        }

    def _plan_decode(self, kind: _Kind, host: Inputs, bucket: int, staging_index: int) -> None:
        info = self._native_plan(
            self._decode_wrappers[bucket],
            kind,
            kind.decode,
            host,
            bucket,
            bucket,
            staging_index,
            graph=True,
            causal=False,
            part_pages=self._part_pages(kind, host, bucket),
        )
        if [int(x) for x in info] != kind.plans[bucket]:
            raise RuntimeError(
                f"FlashInfer plans {bucket} rows differently from when their graph was captured: "
                "its version does not suit this engine"
            )

    def _part_pages(self, kind: _Kind, host: Inputs, bucket: int) -> int | None:
        """Return the size of the parts into which long sequences are split; None: FlashInfer's plan decides."""
        if bucket < self._largest_split_by_plan:
            return None
        indptr, info = host.kv_indptr[: bucket + 1].numpy(), kind.plans[bucket]
        least = max(1, _LEAST_PART // self._shape.block_size)
        pages = kind.pages_to_read(indptr[1:] - indptr[:-1], info[_TILE_ROWS], self._shape.block_size)
        return part_pages(pages, info[_PARTS], least=least)

    def _plan_prefill(self, kind: _Kind, host: Inputs, device: Inputs, size: Size, staging_index: int) -> None:
        schedule = self._native_plan(
            self._prefill_wrapper,
            kind,
            kind.prefill,
            host,
            size.tokens,
            size.rows,
            staging_index,
            graph=False,
            causal=True,
        )
        arrays = (device.qo_indptr, device.kv_indptr, device.kv_indices, device.last_page_len)
        kind.prefill_call = self._call(self._backend, kind, kind.prefill, schedule, arrays, _CAUSAL)

    def _make_prefill_wrapper(self, host: Inputs, size: Size) -> Any:
        wrapper = self._fi.BatchPrefillWithPagedKVCacheWrapper(self._floats, kv_layout="NHD", backend=self._backend)
        self._first.prefill.attach(wrapper)
        self._first_plan(
            wrapper,
            qo_indptr=host.qo_indptr,
            paged_kv_indptr=host.kv_indptr,
            paged_kv_indices=host.kv_indices,
            paged_kv_last_page_len=host.last_page_len,
            causal=True,
            **self._geometry("head_dim_qk"),
        )
        return wrapper

    def _native_plan(
        self,
        wrapper: Any,
        kind: _Kind,
        buffers: _PlanBuffers,
        host: Inputs,
        tokens: int,
        rows: int,
        staging_index: int,
        *,
        graph: bool,
        causal: bool,
        part_pages: int | None = None,
    ) -> Any:
        heads, kv_heads, head_dim, block_size = self._shape
        arguments = [
            self._floats,
            buffers.workspace,
            buffers.pinned[staging_index],
            host.qo_indptr[: rows + 1],
            host.kv_indptr[: rows + 1],
            host.kv_lens[:rows],
            tokens,
            rows,
            heads,
            kv_heads,
            block_size,
            graph,
            head_dim,
            head_dim,
            causal,
            kind.window_left,
        ]
        if wrapper._backend == "fa2":
            arguments += [part_pages or -1, False, 0]  # -1: no fixed split size; split KV on, no blocks reserved
        return wrapper._cached_module.plan(*arguments)


@dataclass(slots=True)
class _AttentionCall:
    """A module's attention with all arguments that do not differ between layers."""

    function: Any
    workspaces: tuple[torch.Tensor, torch.Tensor]
    schedule: Any
    arrays: tuple[torch.Tensor, ...]
    options: tuple[Any, ...]

    def run(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, out: torch.Tensor) -> None:
        self.function(*self.workspaces, self.schedule, q, keys, values, *self.arrays, out, *self.options)


class _Kind:
    """The schedules of layers with the same window. `window_left`: keys that a token sees before its own, or
    _NO_WINDOW."""

    def __init__(self, window_left: int, decode: _PlanBuffers, prefill: _PlanBuffers) -> None:
        self.window_left = window_left
        self.decode = decode
        self.prefill = prefill
        self.decode_calls: dict[int, _AttentionCall] = {}
        self.plans: dict[int, list[int]] = {}  # the plan info with which the graph of a bucket was captured
        self.prefill_call: _AttentionCall

    def pages_to_read(self, pages: NDArray[np.int32], tile_rows: int, block_size: int) -> NDArray[np.int32]:
        """Return how many of the `pages` of each sequence FlashInfer's plan counts."""
        if self.window_left == _NO_WINDOW:
            return pages
        return np.minimum(pages, -(-(self.window_left + tile_rows) // block_size))


class _LayerViews(NamedTuple):
    """Keys and values of a layer in the pool, and how it attends to them."""

    pages: tuple[torch.Tensor, torch.Tensor]
    kind: _Kind


def _blocks_at_once(device: torch.device) -> int:
    """Return how many thread blocks FlashInfer's plan counts on the device."""
    if device.type != "cuda":
        return 0
    return _BLOCKS_PER_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


class _PlanBuffers:
    """The buffers in which schedules are made: a pinned buffer for each staging set, one workspace on the device.

    One more pinned buffer is for the wrappers' own plans, because no step waits for the copy from it.
    """

    def __init__(self, device: torch.device, num_staging_sets: int, nbytes: int) -> None:
        self.workspace = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        self.pinned = [torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True) for _ in range(num_staging_sets + 1)]

    def attach(self, wrapper: Any) -> None:
        """Make `wrapper` use these buffers instead of 16 MiB of its own."""
        wrapper._int_workspace_buffer = self.workspace
        wrapper._pin_memory_int_workspace_buffer = self.pinned[-1]
