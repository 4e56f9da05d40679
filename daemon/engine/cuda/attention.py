"""Attention over the paged pool: FlashInfer's kernels, all calls of them in this file, or torch as the reference.

The pool is blocks-first, `[blocks, layers, 2, block_size, kv_heads, head_dim]`. FlashInfer reads a layer through
strides: it gets the views ``pool[:, layer, 0]`` and ``pool[:, layer, 1]``.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch

from daemon.engine.cuda.arrays import Inputs, Size

FLOAT_WORKSPACE = 256 << 20
"""Bytes for the partial results of split sequences; 512 decode rows of an 8B need 167 MB of it."""

INT_WORKSPACE = 8 << 20
"""Bytes for one schedule."""


class Heads(NamedTuple):
    """The shape that attention sees."""

    heads: int
    kv_heads: int
    head_dim: int
    block_size: int


class Attention(Protocol):
    """Attention of a step's rows. A pass is either decodes, of a prepared bucket, or chunks."""

    def adopt(self, pool: torch.Tensor) -> None:
        """Read and write `pool` from now on."""
        ...

    def prepare(self, bucket: int, device: Inputs, host: Inputs) -> None:
        """Make ready for decodes of `bucket` rows, always from the arrays `device`; `host`: the same on the host,
        filled with anything valid."""
        ...

    def plan(self, host: Inputs, device: Inputs, size: Size, *, decode: bool, turn: int) -> None:
        """Lay out the work of the pass that is submitted next. `host`, `device`: CPU tensors and the device's, for
        chunks cut to `size`; `turn`: which set of staging buffers this step has."""
        ...

    def pages(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer: views [blocks, block_size, kv_heads, head_dim]."""
        ...

    def attend(self, layer: int, q: torch.Tensor, inputs: Inputs, *, decode: bool) -> torch.Tensor:
        """Let q [n, heads, head_dim] attend to each sequence up to its own position, whose KV is in the pool. Gives
        [n, heads, head_dim] in the dtype of q."""
        ...


class TorchAttention:
    """Row by row, from the very arrays that FlashInfer gets, in float32. Slow; the definition."""

    def __init__(self, shape: Heads) -> None:
        self._shape = shape
        self._pool: torch.Tensor

    def adopt(self, pool: torch.Tensor) -> None:
        self._pool = pool

    def prepare(self, bucket: int, device: Inputs, host: Inputs) -> None:
        """Nothing to prepare."""

    def plan(self, host: Inputs, device: Inputs, size: Size, *, decode: bool, turn: int) -> None:
        """Nothing to plan."""

    def pages(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._pool[:, layer, 0], self._pool[:, layer, 1]

    def attend(self, layer: int, q: torch.Tensor, inputs: Inputs, *, decode: bool) -> torch.Tensor:
        out = torch.empty_like(q)
        queries, pages = inputs.qo_indptr.tolist(), inputs.kv_indptr.tolist()
        for row, last in enumerate(inputs.last_page_len.tolist()):
            mine = slice(queries[row], queries[row + 1])
            blocks = inputs.kv_indices[pages[row] : pages[row + 1]].long()
            length = (len(blocks) - 1) * self._shape.block_size + last
            kv = self._pool[blocks, layer].transpose(0, 1).flatten(1, 2)[:, :length]
            out[mine] = self._row(q[mine], kv).to(q.dtype)
        return out

    def _row(self, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        """q [n, heads, head_dim], the last of `kv` [2, length, kv_heads, head_dim]: [n, heads, head_dim] float32."""
        count, length = len(q), kv.shape[1]
        k, v = kv.float().repeat_interleave(self._shape.heads // self._shape.kv_heads, dim=2)
        scores = torch.einsum("qhd,khd->hqk", q.float(), k) * self._shape.head_dim**-0.5
        own = torch.arange(length - count, length, device=q.device)
        hidden = torch.arange(length, device=q.device) > own[:, None]
        weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1)
        return torch.einsum("hqk,khd->qhd", weights, v)


class FlashInferAttention:
    """Decodes by the tensor-core decode wrapper, one a bucket, in graph mode; chunks by the prefill wrapper.

    A wrapper's own `plan` runs once, to load its module; then steps call the module's plan themselves, with arrays
    that already lie on the host and a pinned buffer by turns: the wrapper would take the largest length
    with Python's `max` over a tensor, and overwrite its one pinned buffer while the copy of the step before may still
    be under way. All schedules of a kind share one workspace on the device: the stream orders them.

    FlashInfer's kernels read schedules, `indptr`s and lengths before they wait for the kernel in front of them, so
    those may be written by copies only, and never by a kernel.
    """

    def __init__(
        self,
        shape: Heads,
        *,
        dtype: torch.dtype,
        kv_dtype: torch.dtype,
        device: torch.device,
        turns: int,
        prefill_backend: str = "fa2",
    ) -> None:
        """`turns`: sets of staging buffers. `prefill_backend`: "fa2" or, not with e4m3 KV, "fa3"."""
        import flashinfer

        self._fi: Any = flashinfer
        self._shape = shape
        self._dtypes = {"q_data_type": dtype, "kv_data_type": kv_dtype, "o_data_type": dtype}
        self._backend = prefill_backend
        self._floats = torch.zeros(FLOAT_WORKSPACE, dtype=torch.uint8, device=device)
        self._decode = _Schedules(device, turns)
        self._prefill = _Schedules(device, turns)
        self._decoders: dict[int, Any] = {}
        self._plans: dict[int, list[int]] = {}  # what the graph of a bucket was captured with
        self._prefiller: Any = None
        self._layers: list[tuple[torch.Tensor, torch.Tensor]] = []

    def adopt(self, pool: torch.Tensor) -> None:
        self._layers = [(pool[:, layer, 0], pool[:, layer, 1]) for layer in range(pool.shape[1])]

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
        self._decode.lend(wrapper)
        pages = int(host.kv_indptr[bucket])
        wrapper.plan(
            indptr=host.kv_indptr[: bucket + 1],
            indices=host.kv_indices[:pages],
            last_page_len=host.last_page_len[:bucket],
            non_blocking=False,
            **self._geometry("head_dim"),
        )
        self._decoders[bucket] = wrapper
        self._plans[bucket] = [int(x) for x in wrapper._plan_info]

    def plan(self, host: Inputs, device: Inputs, size: Size, *, decode: bool, turn: int) -> None:
        if decode:
            self._plan_decode(host, size.rows, turn)
        else:
            self._plan_prefill(host, device, size, turn)

    def pages(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._layers[layer]

    def attend(self, layer: int, q: torch.Tensor, inputs: Inputs, *, decode: bool) -> torch.Tensor:
        wrapper = self._decoders[len(q)] if decode else self._prefiller
        return wrapper.run(q, self._layers[layer], out=torch.empty(q.shape, dtype=q.dtype, device=q.device))

    def _geometry(self, head_dim: str) -> dict[str, Any]:
        """Arguments that both wrappers' plans share; they call the head's width by different names."""
        heads, kv_heads, width, block_size = self._shape
        return {
            "num_qo_heads": heads,
            "num_kv_heads": kv_heads,
            head_dim: width,
            "page_size": block_size,
            **self._dtypes,
        }

    def _plan_decode(self, host: Inputs, bucket: int, turn: int) -> None:
        wrapper = self._decoders[bucket]
        info = self._native_plan(wrapper, self._decode, host, bucket, bucket, turn, graph=True, causal=False)
        if [int(x) for x in info] != self._plans[bucket]:
            raise RuntimeError(
                f"FlashInfer lays out {bucket} rows otherwise than when their graph was captured: "
                "its version does not suit this engine"
            )

    def _plan_prefill(self, host: Inputs, device: Inputs, size: Size, turn: int) -> None:
        if self._prefiller is None:
            self._prefiller = self._make_prefiller(host, size)
        wrapper = self._prefiller
        wrapper._plan_info = self._native_plan(
            wrapper, self._prefill, host, size.tokens, size.rows, turn, graph=False, causal=True
        )
        wrapper._batch_size = size.rows
        wrapper._qo_indptr_last = size.tokens
        wrapper._qo_indptr_buf = device.qo_indptr
        wrapper._paged_kv_indptr_buf = device.kv_indptr
        wrapper._paged_kv_indices_buf = device.kv_indices
        wrapper._paged_kv_last_page_len_buf = device.last_page_len

    def _make_prefiller(self, host: Inputs, size: Size) -> Any:
        wrapper = self._fi.BatchPrefillWithPagedKVCacheWrapper(self._floats, kv_layout="NHD", backend=self._backend)
        self._prefill.lend(wrapper)
        wrapper.plan(
            qo_indptr=host.qo_indptr,
            paged_kv_indptr=host.kv_indptr,
            paged_kv_indices=host.kv_indices,
            paged_kv_last_page_len=host.last_page_len,
            causal=True,
            non_blocking=False,
            **self._geometry("head_dim_qk"),
        )
        return wrapper

    def _native_plan(
        self,
        wrapper: Any,
        schedules: _Schedules,
        host: Inputs,
        tokens: int,
        rows: int,
        turn: int,
        *,
        graph: bool,
        causal: bool,
    ) -> Any:
        heads, kv_heads, head_dim, block_size = self._shape
        arguments = [
            self._floats,
            schedules.workspace,
            schedules.pinned[turn],
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
            -1,  # no sliding window
        ]
        if wrapper._backend == "fa2":
            arguments += [-1, False, 0]  # split as it sees fit, no blocks for others
        return wrapper._cached_module.plan(*arguments)


class _Schedules:
    """Where schedules are made and kept: a pinned buffer a turn, one workspace on the device.

    One pinned buffer more is for the wrappers' own plans: no step waits for the copy from there.
    """

    def __init__(self, device: torch.device, turns: int) -> None:
        self.workspace = torch.zeros(INT_WORKSPACE, dtype=torch.uint8, device=device)
        self.pinned = [torch.zeros(INT_WORKSPACE, dtype=torch.uint8, pin_memory=True) for _ in range(turns + 1)]

    def lend(self, wrapper: Any) -> None:
        """Have `wrapper` use these instead of 16 MiB of its own."""
        wrapper._int_workspace_buffer = self.workspace
        wrapper._pin_memory_int_workspace_buffer = self.pinned[-1]
