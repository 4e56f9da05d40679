"""The model on a CUDA device, as a `DeviceRunner`; on the CPU, for tests, by the same path without graphs."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch

from daemon.engine.cuda import kernels
from daemon.engine.cuda.arrays import DrawParams, Size, StepArrays
from daemon.engine.cuda.attention import Attention, FlashInferAttention, Heads, TorchAttention
from daemon.engine.cuda.buckets import choose_bucket, graph_buckets, widest_gap
from daemon.engine.cuda.forward import Passes, Room, Staged
from daemon.engine.cuda.graphs import Graphs
from daemon.engine.cuda.memory import LEAST_BLOCKS, pool_blocks, reserve_bytes
from daemon.engine.cuda.model import Llama
from daemon.engine.cuda.ops import FlashInferOps, Ops, TorchOps
from daemon.engine.cuda.sampler import KernelDraw, TorchDraw
from daemon.engine.cuda.slots import Slots
from daemon.engine.cuda.small_batch import Gemv, Way, few_buckets
from daemon.engine.cuda.staging import CudaStream, HostStream, Mark, Rotation, Stream
from daemon.engine.cuda.weights import load_weights
from daemon.engine.request import Request
from daemon.engine.runner import NO_TOKEN, PoolSpec, Row, StepPlan, StepResult
from daemon.engine.sampling.sampler import Sampler, inverse_temperature, min_p_depth
from daemon.ipc.messages import RequestParams, SamplingParams, TokenLogprobs
from daemon.models.model_config import ModelConfig, ModelError

log = logging.getLogger(__name__)

IN_FLIGHT = 2
"""Steps that may be launched and not collected."""

_SEED_MASK = (1 << 64) - 1
_LARGEST_INT32 = (1 << 31) - 1
_KV_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.float8_e4m3fn}


class _Format(NamedTuple):
    """What the model computes in, and what its KV is kept in."""

    dtype: torch.dtype
    kv_dtype: torch.dtype


@dataclass(slots=True, eq=False)
class CudaTicket:
    """A step in flight."""

    plan: StepPlan
    slots: list[int]
    bucket: int  # rows of the decode pass, padding included
    chunks: list[int]  # plan rows of the chunk pass
    hosted: list[int]  # plan rows whose tokens the host draws
    staged: Staged
    dropped: list[int] = field(default_factory=list)
    mark: Mark = field(init=False)


class CudaRunner:
    """Computes steps on `device`: decodes by a graph a bucket, chunks beside them; the next step may be launched
    while one is computed.

    `dtype` "auto" means bf16 on CUDA, fp32 on the CPU. `kv_dtype` "auto": KV as the model computes; "fp8": e4m3 with
    scale 1. `kv_memory`: bytes of the pool; 0: what is free, of the share `memory_share` of the device's memory that
    this engine may have for everything. `way`: how decodes of one to four rows are computed; "auto": the quickest.
    `gemv`: the products of few rows on the CPU. Raises ModelError for what cannot work here, before a
    weight is read.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        device: str,
        dtype: str = "auto",
        kv_dtype: str = "auto",
        deterministic: bool = False,
        load_format: str,
        block_size: int,
        max_num_seqs: int,
        max_batch_tokens: int,
        max_model_len: int,
        kv_memory: int = 0,
        memory_share: float = 0.9,
        prefill: Literal["fa2", "fa3"] = "fa2",
        way: Way | Literal["auto"] = "auto",
        gemv: Gemv | None = None,
    ) -> None:
        self._device = torch.device(device)
        self.device = device  # until it is known by its make
        self.eos_token_ids = config.eos_token_ids
        self.max_model_len = min(max_model_len, config.max_position)
        self.vocab_size = config.vocab_size
        self.num_blocks = 0
        self.ways: dict[int, dict[str, float]] = {}  # seconds of a decode step, by bucket, where there was a choice
        self._card = config
        self._load_format = load_format
        self._format = _choose_format(self._device, dtype, kv_dtype, deterministic)
        self._kv_memory = kv_memory
        self._memory_share = memory_share
        self._prefill = prefill
        self._way: Way | Literal["auto"] = way
        self._gemv = gemv
        self._heads = Heads(config.num_heads, config.num_kv_heads, config.head_dim, block_size)
        self._buckets = graph_buckets(max_num_seqs)
        self._room = _room(self._buckets, max_batch_tokens, self.max_model_len, block_size, config.vocab_size)
        self._slots: Slots[Request] = Slots(self._room.slots)
        self._arrays = StepArrays(self._room.slots, self.max_model_len, block_size)
        self._host_sampler = Sampler(config.vocab_size, 1, config.eos_token_ids)
        self._flying: deque[CudaTicket] = deque()
        self._pool: torch.Tensor
        if self._device.type == "cuda":
            _ready(config, self._device, kv_dtype, prefill)
            self.device = torch.cuda.get_device_name(self._device)

    # -- life ----------------------------------------------------------------------------------

    def pool_spec(self, num_blocks: int) -> PoolSpec:
        kv_dtype = self._format.kv_dtype
        _, kv_heads, head_dim, block_size = self._heads
        name = str(kv_dtype).removeprefix("torch.")
        return PoolSpec(num_blocks, self._card.num_layers, block_size, kv_heads, head_dim, name, kv_dtype.itemsize)

    @property
    def pool_memory(self) -> torch.Tensor:
        """The pool as uint8[pool_spec(num_blocks).nbytes] on the device: one allocation of its own."""
        return self._pool.view(-1).view(torch.uint8)

    def load(self, pool: memoryview | None = None) -> None:
        """See `DeviceRunner.load`; `pool` is for the CPU alone. Raises ModelError if no block finds room."""
        if pool is not None and self._device.type == "cuda":
            raise ValueError("a CUDA device cannot compute from a pool in the host's memory")
        with torch.inference_mode():
            self._build()
            if self._device.type == "cuda":
                self._adopt(torch.zeros(self.pool_spec(1).nbytes, dtype=torch.uint8, device=self._device))
                self._settle()
                self.num_blocks = self._measure()
            else:
                self.num_blocks = (self._kv_memory if pool is None else len(pool)) // self.pool_spec(1).block_bytes
            if self.num_blocks < LEAST_BLOCKS:
                raise ModelError(f"kv_memory of {self._kv_memory} bytes holds no KV block; give it more")
            self._adopt(self._allocate(pool))
            self._settle()
            if isinstance(self._stream, CudaStream):
                self._capture(self._stream)
        self.execute(_dummy_plan([2], decode=True))
        self.execute(_dummy_plan([2], decode=False))
        self._host_sampler.warm_up()

    def _build(self) -> None:
        """Everything but the pool and the graphs."""
        ops, self._attention, gemv, self._stream = self._parts()
        weights = load_weights(self._card, self._load_format, self._device, self._format.dtype)
        model = Llama(self._card, weights, ops, self._attention, max_len=self.max_model_len, gemv=gemv)
        draw = KernelDraw if self._device.type == "cuda" else TorchDraw
        sampler = draw(self._room.sampled, self.vocab_size, self._device)
        self._passes = Passes(model, self._attention, sampler, self._room, self._device)
        self._few_buckets = self._choose_few() if gemv is not None else ()
        self._compute_decodes = self._decode
        pinned = self._device.type == "cuda"
        self._staging = Rotation([Staged(turn, self._room, pinned=pinned) for turn in range(IN_FLIGHT)])

    def _parts(self) -> tuple[Ops, Attention, Gemv | None, Stream]:
        if self._device.type != "cuda":
            return TorchOps(), TorchAttention(self._heads), self._gemv, HostStream()
        attention = FlashInferAttention(
            self._heads,
            dtype=self._format.dtype,
            kv_dtype=self._format.kv_dtype,
            device=self._device,
            turns=IN_FLIGHT,
            prefill_backend=self._prefill,
        )
        return FlashInferOps(), attention, kernels.load_gemv(), CudaStream(self._device)

    def _settle(self) -> None:
        """Wait for what was begun outside the engine's stream: it does not wait for that by itself."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _allocate(self, pool: memoryview | None) -> torch.Tensor:
        if pool is not None:
            return torch.frombuffer(pool, dtype=torch.uint8)
        return torch.zeros(self.pool_spec(self.num_blocks).nbytes, dtype=torch.uint8, device=self._device)

    def _adopt(self, memory: torch.Tensor) -> None:
        spec = self.pool_spec(1)
        blocks = len(memory) // spec.block_bytes
        shape = (blocks, spec.layers, 2, spec.block_size, spec.kv_heads, spec.head_dim)
        self._pool = memory[: blocks * spec.block_bytes].view(self._format.kv_dtype).view(shape)
        self._attention.adopt(self._pool)

    def _measure(self) -> int:
        """Blocks that fit beside the weights and the largest step, which is computed to see what it takes."""
        chunk_peak = self._peak(partial(self.execute, _dummy_plan(self._largest_chunks(), decode=False)))
        self._stream.submit(partial(self._prepare, self._buckets[-1]))
        self._stream.mark().wait()
        decode_peak = self._peak(partial(self.execute, _dummy_plan([1] * self._buckets[-1], decode=True)))
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self._device)
        mine = torch.cuda.memory_reserved(self._device)
        may_use = min(free + mine, int(total * self._memory_share))
        block_bytes = self.pool_spec(1).block_bytes
        reserve = reserve_bytes(sum(len(self._ways(bucket)) for bucket in self._buckets), decode_peak)
        peak = max(chunk_peak, decode_peak)
        blocks = pool_blocks(may_use, weights=mine, activation_peak=peak, reserve=reserve, block_bytes=block_bytes)
        if self._kv_memory > blocks * block_bytes:
            raise ModelError(
                f"kv_memory: {self._kv_memory} bytes do not fit on {self._device}; "
                f"{blocks * block_bytes} are left for KV"
            )
        return self._kv_memory // block_bytes if self._kv_memory else blocks

    def _peak(self, step: partial[StepResult]) -> int:
        """Most bytes that `step` has allocated at a time."""
        step()  # libraries take what they keep
        self._settle()
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        step()
        self._settle()
        return torch.cuda.max_memory_allocated(self._device) - before

    def _largest_chunks(self) -> list[int]:
        """Token counts of a step that is all prefill, as full as can be."""
        left = self._room.chunks.tokens
        chunks: list[int] = []
        while left and len(chunks) < self._room.chunks.rows:
            chunks.append(min(left, self.max_model_len))
            left -= chunks[-1]
        return chunks

    def _choose_few(self) -> tuple[int, ...]:
        """Buckets that `FewRows` can compute."""
        if self._way == "all rows":
            return ()
        if self._device.type == "cuda":
            properties: Any = torch.cuda.get_device_properties(self._device)
            memory = properties.shared_memory_per_block_optin
        else:
            memory = 1 << 30  # no limit
        return few_buckets(self._buckets, self._card, memory)

    def _capture(self, stream: CudaStream) -> None:
        graphs = Graphs(stream)
        for bucket in reversed(self._buckets):
            with torch.cuda.stream(stream.stream):
                self._prepare(bucket)
            graphs.capture(bucket, self._ways(bucket), self._passes.logits[:bucket])
        self._compute_decodes, self.ways = graphs.replay, graphs.seconds

    def _ways(self, bucket: int) -> Mapping[str, Callable[[], None]]:
        """To compute decodes of `bucket` rows; the first is certain."""
        if bucket not in self._few_buckets:
            ways: tuple[Way, ...] = ("all rows",)
        else:
            ways = get_args(Way) if self._way == "auto" else (self._way,)
        return {way: partial(self._passes.decode, bucket, way) for way in ways}

    def _decode(self, bucket: int) -> None:
        """Without a graph."""
        next(iter(self._ways(bucket).values()))()

    def _prepare(self, bucket: int) -> None:
        """Have decodes of `bucket` rows possible, and one of dummies on the device."""
        staged = self._staging.next()
        size = self._arrays.decodes([], [], bucket, staged.decode_arrays)
        self._passes.prepare(staged, bucket)
        self._passes.plan_decodes(staged, size)

    # -- steps ---------------------------------------------------------------------------------

    def execute(self, plan: StepPlan) -> StepResult:
        return self.collect(self.launch(plan))

    def stands_alone(self, plan: StepPlan) -> bool:
        """See `Overlapping`: with rows that have penalties, bias, min_tokens or logprobs."""
        for ticket in self._flying:
            if ticket.plan is plan:
                return bool(ticket.hosted)
        return bool(self._arrays.on_host(plan.rows, self._assign(plan)))

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> CudaTicket:
        """See `Overlapping`. Raises ValueError, and leaves no trace, for what is too large or may not follow the
        steps under way, such as a row whose unknown token none of them draws."""
        if len(self._flying) == IN_FLIGHT:
            raise ValueError(f"{IN_FLIGHT} steps are in flight: collect the oldest first")
        if self._flying and self._flying[-1].hosted:
            raise ValueError("the step in flight has tokens to draw on the host: collect it first")
        self._check_room(plan)
        slots = self._assign(plan)
        first = plan.num_decodes
        ticket = CudaTicket(
            plan,
            slots,
            choose_bucket(self._buckets, first) if first else 0,
            list(range(first, len(plan.rows))),
            self._arrays.on_host(plan.rows, slots),
            self._staging.next(),
        )
        # Both before either is submitted: what is refused leaves nothing half begun.
        decoded = self._fill_decodes(ticket) if first else None
        chunked = self._fill_chunks(ticket) if ticket.chunks else None
        self._note_draws(ticket, decoded, chunked)
        if decoded:
            self._stream.submit(partial(self._submit_decodes, ticket.staged, decoded))
        if chunked:
            self._stream.submit(partial(self._submit_chunks, ticket, chunked))
        self._stream.submit(partial(self._submit_fetch, ticket))
        ticket.mark = self._stream.mark()
        self._staging.until(ticket.mark)
        self._slots.begin(slots)
        self._flying.append(ticket)
        return ticket

    @torch.inference_mode()
    def collect(self, ticket: CudaTicket) -> StepResult:
        """See `Overlapping`; `ticket` is the oldest under way, else ValueError."""
        if not self._flying or self._flying[0] is not ticket:
            raise ValueError("steps are collected in the order in which they were launched, once each")
        ticket.mark.wait()
        self._flying.popleft()
        self._slots.end(ticket.slots)
        places = _places(ticket)
        drawn = ticket.staged.tokens.tolist()
        tokens = {i: drawn[place] for i, place in places.items()}
        tokens.update((i, NO_TOKEN) for i in ticket.dropped)
        logprobs = self._draw_on_host(ticket, places, tokens) if ticket.hosted else {}
        sampled = [i for i, row in enumerate(ticket.plan.rows) if row.sample]
        return StepResult(
            [tokens[i] for i in sampled],
            [logprobs.get(i) for i in sampled] if any(logprobs.values()) else None,
            tuple(sorted(ticket.dropped)),
        )

    def _check_room(self, plan: StepPlan) -> None:
        decodes, chunks = plan.num_decodes, plan.rows[plan.num_decodes :]
        if len(plan.rows) > self._buckets[-1] or sum(row.count for row in chunks) > self._room.chunks.tokens:
            raise ValueError(
                f"a step of {decodes} decodes and {len(chunks)} chunks with {plan.num_tokens} tokens is "
                f"more than max_num_seqs {self._buckets[-1]} or max_batch_tokens allow"
            )

    def _assign(self, plan: StepPlan) -> list[int]:
        slots, fresh = self._slots.assign([row[0] for row in plan.rows])
        for slot, request in fresh:
            self._arrays.adopt(slot, request, _draw_params(request.sampling))
        return slots

    def _note_draws(self, ticket: CudaTicket, decoded: Size | None, chunked: Size | None) -> None:
        """Keep the books of what is in last_token. Raises ValueError for a row whose token is not there."""
        staged = ticket.staged
        passes = [(staged.decode_arrays, decoded), (staged.chunk_arrays, chunked)]
        filled = [(inputs, size) for inputs, size in passes if size]
        for inputs, size in filled:
            self._arrays.check_unknown(inputs, size)
        for inputs, size in filled:
            self._arrays.note_drawn(inputs, size)
        self._arrays.note_hosted([ticket.slots[i] for i in ticket.hosted])

    def _fill_decodes(self, ticket: CudaTicket) -> Size:
        count = ticket.plan.num_decodes
        return self._arrays.decodes(
            ticket.plan.rows[:count], ticket.slots[:count], ticket.bucket, ticket.staged.decode_arrays
        )

    def _fill_chunks(self, ticket: CudaTicket) -> Size:
        rows, slots = [ticket.plan.rows[i] for i in ticket.chunks], [ticket.slots[i] for i in ticket.chunks]
        return self._arrays.chunks(rows, slots, ticket.staged.chunk_arrays)

    def _submit_decodes(self, staged: Staged, size: Size) -> None:
        self._passes.plan_decodes(staged, size)
        self._compute_decodes(size.rows)

    def _submit_chunks(self, ticket: CudaTicket, size: Size) -> None:
        while not self._try_chunks(ticket, size):
            self._dropped(ticket)
            if not ticket.chunks:
                return
            size = self._fill_chunks(ticket)

    def _try_chunks(self, ticket: CudaTicket, size: Size) -> bool:
        try:
            self._passes.chunks(ticket.staged, size, ticket.bucket)
        except torch.OutOfMemoryError:
            return False
        return True

    def _dropped(self, ticket: CudaTicket) -> None:
        """Give up the largest of the chunks, for the others to find room."""
        rows = ticket.plan.rows
        largest = max(ticket.chunks, key=lambda i: rows[i].count)
        ticket.chunks.remove(largest)
        ticket.dropped.append(largest)
        log.error(
            "out of memory on %s: request %d ends with an error, a chunk of %d tokens did not fit; "
            "lower max_batch_tokens",
            self._device,
            rows[largest].request.rid,
            rows[largest].count,
        )
        self._stream.mark().wait()  # its arrays are about to be filled anew
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _submit_fetch(self, ticket: CudaTicket) -> None:
        sampled = sum(ticket.plan.rows[i].sample for i in ticket.chunks)
        self._passes.fetch(ticket.staged, ticket.bucket + sampled)

    def _draw_on_host(
        self, ticket: CudaTicket, places: dict[int, int], tokens: dict[int, int]
    ) -> dict[int, TokenLogprobs | None]:
        """Draw the tokens of the hosted rows from their logits, into `tokens`; returns their logprobs."""
        hosted = [i for i in ticket.hosted if i in places]
        rows = [ticket.plan.rows[i] for i in hosted]
        if any(len(row.request.tokens) != row.start + row.count for row in rows):
            raise RuntimeError("a request whose tokens the host draws went on before its step was collected")
        logits = torch.empty(len(rows), self.vocab_size)
        for into, i in zip(logits, hosted, strict=True):
            into.copy_(self._passes.logits[places[i]])
        result = self._host_sampler.sample(logits, [row.request for row in rows])
        tokens.update(zip(hosted, result.tokens, strict=True))
        return dict(zip(hosted, result.logprobs or [None] * len(rows), strict=True))


def _places(ticket: CudaTicket) -> dict[int, int]:
    """Where in the step's tokens and logits each computed row that samples has its own, by plan row."""
    rows = ticket.plan.rows
    places = {i: i for i in range(ticket.plan.num_decodes) if rows[i].sample}
    sampled = [i for i in ticket.chunks if rows[i].sample]
    return places | {i: ticket.bucket + n for n, i in enumerate(sampled)}


def _choose_format(device: torch.device, dtype: str, kv_dtype: str, deterministic: bool) -> _Format:
    cuda = device.type == "cuda"
    if cuda and deterministic:
        raise ModelError("deterministic is for the CPU engines: on a GPU rounding depends on the batch")
    if cuda and dtype == "fp32":
        raise ModelError("a CUDA engine computes in bf16: set dtype to auto or bf16")
    name = dtype if dtype != "auto" else "bf16" if cuda else "fp32"
    if kv_dtype not in ("auto", "fp8"):
        raise ModelError(f"kv_dtype {kv_dtype!r} is not known; auto and fp8 are")
    return _Format(_KV_DTYPES[name], _KV_DTYPES[name if kv_dtype == "auto" else kv_dtype])


def _room(buckets: tuple[int, ...], max_batch_tokens: int, max_len: int, block_size: int, vocab_size: int) -> Room:
    rows = buckets[-1]
    pages = rows * -(-max_len // block_size)
    return Room(
        decodes=Size(rows, rows, rows, pages),
        chunks=Size(max_batch_tokens, rows, rows, pages),
        # The rows of a step are at most `rows`, but its decodes are padded before the chunks' tokens follow.
        sampled=rows + widest_gap(buckets),
        vocab_size=vocab_size,
        slots=IN_FLIGHT * rows,
    )


def _ready(config: ModelConfig, device: torch.device, kv_dtype: str, prefill: Literal["fa2", "fa3"]) -> None:
    """Check the device, and have FlashInfer load what was compiled ahead of time. Raises ModelError naming what is
    missing."""
    settings = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "") + os.environ.get("PYTORCH_ALLOC_CONF", "")
    if "expandable_segments:true" in settings.lower():
        raise ModelError(
            "expandable_segments is on in PYTORCH_ALLOC_CONF: other engines could not map such a pool; take it out"
        )
    if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(f"there is no {device}; PyTorch sees {torch.cuda.device_count()} CUDA devices")
    torch.cuda.set_device(device)
    arch = kernels.arch_of(*torch.cuda.get_device_capability(device))
    try:
        specs = kernels.required(config, arch=arch, kv_dtype="fp8" if kv_dtype == "fp8" else "auto", prefill=prefill)
        kernels.use(kernels.check(specs, arch))
    except kernels.KernelError as e:
        raise ModelError(str(e)) from e


def _draw_params(sampling: SamplingParams) -> DrawParams:
    seed = sampling.seed & _SEED_MASK
    return DrawParams(
        inverse_temperature=inverse_temperature(sampling),
        min_p_depth=min_p_depth(sampling),
        top_k=min(sampling.top_k, _LARGEST_INT32),
        top_p=sampling.top_p,
        seed=seed - (seed >> 63 << 64),
    )


def _dummy_plan(counts: list[int], *, decode: bool) -> StepPlan:
    """Decodes of so many tokens each, or chunks, all in the dummy block."""
    params = RequestParams(SamplingParams(max_tokens=1, seed=0), arrival=0.0)
    rows = []
    for count in counts:
        tokens = [0] * count
        request = Request(
            rid=0, epoch=0, frontend=0, params=params, tokens=tokens, prompt_len=count, block_table=[0] * count
        )
        rows.append(Row(request, count - 1, 1, True) if decode else Row(request, 0, count, True))
    return StepPlan(rows, len(rows) if decode else 0)
