"""The runner of a CUDA engine: launches steps, and collects their tokens one step later.

Tests run the same code on the CPU, without graphs.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch

from daemon.engine.cuda import fp8, kernels
from daemon.engine.cuda.arrays import Size, StepArrays
from daemon.engine.cuda.attention import Attention, FlashInferAttention, Scoring, TorchAttention
from daemon.engine.cuda.buckets import choose_bucket, graph_buckets
from daemon.engine.cuda.decode_paths import DecodePaths
from daemon.engine.cuda.device import (
    check_device,
    choose_format,
    device_memory,
    explained_out_of_memory,
    head_dims,
    shared_memory_bytes,
)
from daemon.engine.cuda.dummy_steps import dummy_step, largest_step
from daemon.engine.cuda.features import unsupported
from daemon.engine.cuda.forward import ForwardPass, StagingSet, capacity_of
from daemon.engine.cuda.memory import MIN_BLOCKS, pool_blocks, reserve_bytes
from daemon.engine.cuda.mixed_steps import CHUNK, DECODES, MixedSteps, fastest_way, measure_ways
from daemon.engine.cuda.model import Decoder
from daemon.engine.cuda.ops import FlashInferOps, Ops, TorchOps
from daemon.engine.cuda.product_choice import LIMITS, Limits, choose_products
from daemon.engine.cuda.products import Products
from daemon.engine.cuda.sampler import KernelSampler, TorchSampler, slot_sampling
from daemon.engine.cuda.scoring import PassScores
from daemon.engine.cuda.slots import Slots
from daemon.engine.cuda.small_batch import DecodePath, Gemv, small_batch_buckets
from daemon.engine.cuda.staging import CudaStream, HostStream, RoundRobin, Stream
from daemon.engine.cuda.ticket import CudaTicket
from daemon.engine.cuda.weights import DeviceWeights, load_weights
from daemon.engine.cuda.workspace import HeadShape
from daemon.engine.request import Request
from daemon.engine.runner import NO_TOKEN, PoolSpec, RunnerSettings, StepPlan, StepResult
from daemon.engine.sampling.sampler import Sampler
from daemon.ipc.messages import TokenLogprobs
from daemon.models.model_config import ModelConfig, ModelError

log = logging.getLogger(__name__)

IN_FLIGHT = 2
"""Number of steps that may be launched and not yet collected."""


class CudaRunner:
    """Computes steps on `device`: decodes by one CUDA graph per bucket; prefill chunks, and decodes beside them,
    without a graph.

    The next step may be launched while one is computed.

    `settings.dtype` "auto" means bf16 on CUDA, where FP8 weights stay FP8 (`fp8.py`), and fp32 on the CPU.
    `prefill`: FlashInfer's backend for chunks.
    `decode_path`: how decodes of one to four rows are computed; "auto": by the fastest path. `gemv`: the small-batch
    products on the CPU, for tests. `mixed_steps`: how decodes beside chunks are computed; "auto": by the faster way,
    on the CPU in one pass. `product_limits`: how much is measured to choose algorithms for products; None: torch
    computes all of them. Raises ModelError for settings that cannot work here, before a weight is read.
    """

    def __init__(
        self,
        config: ModelConfig,
        settings: RunnerSettings,
        *,
        device: str,
        prefill: Literal["fa2", "fa3"] = "fa2",
        decode_path: DecodePath | Literal["auto"] = "auto",
        gemv: Gemv | None = None,
        mixed_steps: MixedSteps | Literal["auto"] = "auto",
        product_limits: Limits | None = LIMITS,
    ) -> None:
        if what := unsupported(config):
            raise ModelError(f"{config.name}: the CUDA engine does not compute {what}; serve it on cpu")
        self._device = torch.device(device)
        self.device = device  # on CUDA: replaced by the name of the product below
        self.eos_token_ids = config.eos_token_ids
        self.max_model_len = min(settings.max_model_len, config.max_position)
        self.vocab_size = config.vocab_size
        self.num_blocks = 0
        self.products: Products  # set by `load`
        self.arithmetic = ""  # the same
        self.path_seconds: dict[int, dict[str, float]] = {}  # of a decode step, by bucket with several paths
        self.mixed_seconds: dict[MixedSteps, float] = {}  # of a step of decodes and a chunk, if measured
        self._stored = config
        self._config = config = kernels.widened(config, head_dims(self._device))
        self._settings = settings
        self._format = choose_format(self._device, settings)
        self._prefill = prefill
        self._decode_path: DecodePath | Literal["auto"] = decode_path
        self._gemv = gemv
        self._choose_mixed_steps = mixed_steps == "auto"
        self._mixed_steps: MixedSteps = "one pass" if mixed_steps == "auto" else mixed_steps
        self._product_limits = product_limits
        self._heads = HeadShape(config.num_heads, config.num_kv_heads, config.head_dim, settings.block_size)
        self._buckets = graph_buckets(settings.max_num_seqs)
        self._capacity = capacity_of(
            self._buckets,
            settings.max_batch_tokens,
            pages=-(-self.max_model_len // settings.block_size),
            vocab_size=config.vocab_size,
            in_flight=IN_FLIGHT,
        )
        self._slots: Slots[Request] = Slots(self._capacity.slots)
        self._arrays = StepArrays(self._capacity.slots, self.max_model_len, settings.block_size)
        self._host_sampler = Sampler(config.vocab_size, 1, config.eos_token_ids)
        self._in_flight: deque[CudaTicket] = deque()
        self._pool: torch.Tensor
        if self._device.type == "cuda":
            check_device(config, self._device, settings.kv_dtype, prefill)
            self.device = torch.cuda.get_device_name(self._device)

    # -- loading -------------------------------------------------------------------------------

    def pool_spec(self, num_blocks: int) -> PoolSpec:
        kv_dtype = self._format.kv_dtype
        _, kv_heads, head_dim, block_size = self._heads
        name = str(kv_dtype).removeprefix("torch.")
        return PoolSpec(num_blocks, self._config.num_layers, block_size, kv_heads, head_dim, name, kv_dtype.itemsize)

    @property
    def pool_memory(self) -> torch.Tensor:
        """KV pool as uint8[pool_spec(num_blocks).nbytes] on the device: a separate allocation."""
        return self._pool.view(-1).view(torch.uint8)

    def load(self, pool: memoryview | None = None) -> None:
        """See `DeviceRunner.load`. `pool`: on the CPU only.

        Raises ModelError if not a single block fits, Unavailable if that may change.
        """
        if pool is not None and self._device.type == "cuda":
            raise ValueError("a CUDA device cannot compute from a pool in host memory")
        keep_fp8 = self._keeps_fp8()
        weights = self._config.num_params * self._format.dtype.itemsize
        weights -= self._config.linear_params if keep_fp8 else 0  # one byte instead of two
        with torch.inference_mode(), explained_out_of_memory(self._device, self._settings.memory_share, weights):
            self._build(keep_fp8=keep_fp8)
            if self._device.type == "cuda":
                self._use_pool(torch.zeros(self.pool_spec(1).nbytes, dtype=torch.uint8, device=self._device))
                self._synchronize()
                self.num_blocks = self._measure()
            else:
                nbytes = self._settings.kv_memory if pool is None else len(pool)
                self.num_blocks = nbytes // self.pool_spec(1).block_bytes
            if self.num_blocks < MIN_BLOCKS:
                raise ModelError(f"kv_memory of {self._settings.kv_memory} bytes holds no KV block; increase it")
            self._use_pool(self._allocate(pool))
            self._synchronize()
            if isinstance(self._stream, CudaStream):
                self._capture(self._stream)
                if self._choose_mixed_steps:
                    self._measure_mixed_steps()
                # A capture empties the allocator's cache. Take the memory of the largest step again now: a prompt
                # must not wait for it, and must not find it taken.
                self.execute(self._largest_step())
        self.execute(dummy_step(decodes=[2]))
        self.execute(dummy_step(chunks=[2]))
        self._host_sampler.warm_up()

    def _keeps_fp8(self) -> bool:
        settings = self._settings
        as_stored = settings.dtype == "auto" and settings.load_format != "dummy"
        return as_stored and self._stored.fp8_by_rows and fp8.is_supported(self._device)

    def _build(self, *, keep_fp8: bool) -> None:
        """Build everything except the pool and the graphs."""
        ops, self._attention, gemv, self._stream = self._backend()
        head_dim, dtype = self._heads.head_dim, self._format.dtype
        load_format = self._settings.load_format
        weights = load_weights(self._stored, load_format, self._device, dtype, head_dim=head_dim, keep_fp8=keep_fp8)
        self.arithmetic = "fp8" if weights.in_fp8 else str(dtype).removeprefix("torch.")
        self.products = Products(ops)
        model = Decoder(
            self._config, weights, ops, self._attention, max_len=self.max_model_len, gemv=gemv, products=self.products
        )
        sampler_class = KernelSampler if self._device.type == "cuda" else TorchSampler
        sampler = sampler_class(self._capacity.sampled, self.vocab_size, self._device)
        self._forward = ForwardPass(model, self._attention, sampler, self._capacity, self._device)
        small: tuple[int, ...] = ()
        if gemv is not None and self._decode_path != "gemm" and not weights.in_fp8:
            small = small_batch_buckets(self._buckets, self._config, shared_memory_bytes(self._device))
        self._decode_paths = DecodePaths(self._forward, small, self._decode_path)
        self._compute_decodes: Callable[[int], None] = self._decode_paths.run
        self._choose_products(weights)
        pinned = self._device.type == "cuda"
        self._staging = RoundRobin([StagingSet(i, self._capacity, pinned=pinned) for i in range(IN_FLIGHT)])

    def _backend(self) -> tuple[Ops, Attention, Gemv | None, Stream]:
        scoring, offset = Scoring.of(self._config), self._config.norm_offset
        if self._device.type != "cuda":
            return TorchOps(offset), TorchAttention(self._heads, scoring), self._gemv, HostStream()
        attention = FlashInferAttention(
            self._heads,
            dtype=self._format.dtype,
            kv_dtype=self._format.kv_dtype,
            device=self._device,
            num_staging_sets=IN_FLIGHT,
            max_rows=self._buckets[-1],
            max_tokens=self._capacity.chunks.tokens,
            scoring=scoring,
            prefill_backend=self._prefill,
        )
        return FlashInferOps(self._device, offset), attention, kernels.load_gemv(), CudaStream(self._device)

    def _choose_products(self, weights: DeviceWeights) -> None:
        if isinstance(self._stream, CudaStream) and self._product_limits is not None:
            buckets = [bucket for bucket in self._buckets if list(self._decode_paths.of(bucket)) == ["gemm"]]
            self.products.chosen = choose_products(weights, buckets, self._stream, self._product_limits)

    def _synchronize(self) -> None:
        """Wait for all streams of the device. The engine's stream does not wait for the others."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _allocate(self, pool: memoryview | None) -> torch.Tensor:
        if pool is not None:
            return torch.frombuffer(pool, dtype=torch.uint8)
        return torch.zeros(self.pool_spec(self.num_blocks).nbytes, dtype=torch.uint8, device=self._device)

    def _use_pool(self, memory: torch.Tensor) -> None:
        spec = self.pool_spec(1)
        blocks = len(memory) // spec.block_bytes
        shape = (blocks, spec.layers, 2, spec.block_size, spec.kv_heads, spec.head_dim)
        self._pool = memory[: blocks * spec.block_bytes].view(self._format.kv_dtype).view(shape)
        self._attention.use_pool(self._pool)

    def _measure(self) -> int:
        """Return how many blocks fit beside the weights and the largest step.

        Compute the largest step to measure its memory.
        """
        largest, decodes = self._largest_step(), dummy_step(decodes=[1] * self._buckets[-1])
        for plan in (largest, decodes):
            if plan.num_decodes:
                self._stream.submit(partial(self._prepare, choose_bucket(self._buckets, plan.num_decodes)))
        self._stream.record_event().wait()
        largest_peak = self._peak(partial(self.execute, largest))
        decode_peak = self._peak(partial(self.execute, decodes))
        torch.cuda.empty_cache()
        memory = device_memory(self._device, self._settings.memory_share)
        if memory.free < memory.share and not self._settings.kv_memory:
            missing = (memory.share - memory.free) >> 20
            log.warning("other processes hold memory of %s: the KV pool is %d MiB smaller", self._device, missing)
        return pool_blocks(
            memory,
            weights=torch.cuda.memory_reserved(self._device),  # with static buffers
            activation_peak=max(largest_peak, decode_peak),
            reserve=reserve_bytes(sum(len(self._decode_paths.of(bucket)) for bucket in self._buckets), decode_peak),
            block_bytes=self.pool_spec(1).block_bytes,
            wanted=self._settings.kv_memory,
        )

    def _peak(self, step: partial[StepResult]) -> int:
        """Return the peak of the bytes that `step` allocates."""
        step()  # in their first call libraries allocate memory that they keep
        self._synchronize()
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        if step().dropped:
            raise torch.OutOfMemoryError("the largest step does not fit")
        self._synchronize()
        return torch.cuda.max_memory_allocated(self._device) - before

    def _largest_step(self) -> StepPlan:
        """Return a step of the most tokens that are computed in one pass: chunks, and decodes in the other rows."""
        room, mixed = self._capacity.chunks, self._mixed_steps == "one pass"
        return largest_step(rows=room.rows, tokens=room.tokens, max_len=self.max_model_len, mixed=mixed)

    def _capture(self, stream: CudaStream) -> None:
        graphs = self._decode_paths.capture(stream, self._buckets, self._prepare)
        self._compute_decodes, self.path_seconds = graphs.replay, graphs.seconds

    def _measure_mixed_steps(self) -> None:
        """Use the faster way for steps of decodes and chunks from now on."""
        if (decodes := min(DECODES, self._buckets[-1] - 1)) < 1:
            return  # a step has one row

        def use(way: MixedSteps) -> None:
            self._mixed_steps = way

        chunk = min(CHUNK, self._capacity.chunks.tokens, self.max_model_len)
        step = dummy_step(decodes=[1] * decodes, chunks=[chunk])
        self.mixed_seconds = measure_ways(self, step, use, in_flight=IN_FLIGHT)
        self._mixed_steps = fastest_way(self.mixed_seconds)

    def _prepare(self, bucket: int) -> None:
        """Prepare the buffers for decodes of `bucket` rows, and copy a decode step of dummy rows to the device."""
        staged = self._staging.acquire()
        size = self._arrays.decodes([], [], bucket, staged.decode_arrays)
        self._forward.prepare(staged, bucket)
        self._forward.plan_decodes(staged, size)

    # -- steps ---------------------------------------------------------------------------------

    def execute(self, plan: StepPlan) -> StepResult:
        return self.collect(self.launch(plan))

    def blocks_overlap(self, plan: StepPlan) -> bool:
        """See `Overlapping`: true for rows with penalties, logit bias, min_tokens, logprobs or a grammar."""
        for ticket in self._in_flight:
            if ticket.plan is plan:
                return ticket.blocks_overlap
        return bool(plan.masks is not None or self._arrays.host_rows(plan.rows, self._assign(plan)))

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> CudaTicket:
        """See `Overlapping`.

        Raises ValueError, without a side effect, for a step that is too large or may not follow the steps in flight,
        for example a row with an unknown token that none of them samples.
        """
        if len(self._in_flight) == IN_FLIGHT:
            raise ValueError(f"{IN_FLIGHT} steps are in flight: collect the oldest first")
        if self._in_flight and self._in_flight[-1].blocks_overlap:
            raise ValueError("the next tokens depend on what the host does with the step in flight: collect it first")
        self._check_size(plan)
        slots = self._assign(plan)
        first, chunks = plan.num_decodes, list(range(plan.num_decodes, len(plan.rows)))
        host_rows = self._arrays.host_rows(plan.rows, slots)
        ticket = CudaTicket(
            plan,
            slots,
            choose_bucket(self._buckets, first) if first else 0,
            chunks,
            bool(first and chunks) and self._mixed_steps == "one pass",
            host_rows,
            self._arrays.masked_rows(plan.rows, slots, host_rows),
            self._staging.acquire(),
        )
        # Fill decodes and chunks before either are submitted, so that a step that raises has submitted nothing.
        decoded = self._fill_decodes(ticket) if first else None
        chunked = self._fill_chunks(ticket) if ticket.chunks else None
        self._note_sampled(ticket, decoded, chunked)
        try:
            if decoded:
                self._stream.submit(partial(self._submit_decodes, ticket, decoded))
            if chunked:
                self._stream.submit(partial(self._submit_chunks, ticket, chunked))
            self._stream.submit(partial(self._submit_fetch, ticket))
        except Exception:
            self._stream.record_event().wait()  # what is submitted still reads the staging set
            raise
        ticket.done_event = self._stream.record_event()
        self._staging.release_at(ticket.done_event)
        self._slots.begin(slots)
        self._in_flight.append(ticket)
        return ticket

    @torch.inference_mode()
    def collect(self, ticket: CudaTicket) -> StepResult:
        """See `Overlapping`. Raises ValueError unless `ticket` is the oldest step in flight."""
        if not self._in_flight or self._in_flight[0] is not ticket:
            raise ValueError("each step is collected once, in the order of the launches")
        missing = self._sample_masked(ticket) if ticket.masked_rows else {}
        ticket.done_event.wait()
        self._in_flight.popleft()
        self._slots.end(ticket.slots)
        output_rows = ticket.output_rows()
        sampled_tokens = ticket.staged.tokens.tolist()
        tokens = {i: missing.get(row, sampled_tokens[row]) for i, row in output_rows.items()}
        tokens.update((i, NO_TOKEN) for i in ticket.dropped)
        logprobs = self._sample_on_host(ticket, output_rows, tokens) if ticket.host_rows else {}
        sampled = [i for i, row in enumerate(ticket.plan.rows) if row.sample]
        return StepResult(
            [tokens[i] for i in sampled],
            [logprobs.get(i) for i in sampled] if any(logprobs.values()) else None,
            tuple(sorted(ticket.dropped)),
            ticket.prompt_logprobs(),
        )

    def _check_size(self, plan: StepPlan) -> None:
        decodes, chunks = plan.num_decodes, plan.rows[plan.num_decodes :]
        if len(plan.rows) > self._buckets[-1] or sum(row.count for row in chunks) > self._capacity.chunks.tokens:
            raise ValueError(
                f"a step of {decodes} decodes and {len(chunks)} chunks with {plan.num_tokens} tokens is "
                f"more than max_num_seqs {self._buckets[-1]} or max_batch_tokens allow"
            )

    def _assign(self, plan: StepPlan) -> list[int]:
        slots, fresh = self._slots.assign([row[0] for row in plan.rows])
        try:
            for slot, request in fresh:
                self._arrays.assign_slot(slot, request, slot_sampling(request.sampling))
        except Exception:
            self._slots.take_back(fresh)  # a request that keeps its slot would compute with what the slot held before
            raise
        return slots

    def _note_sampled(self, ticket: CudaTicket, decoded: Size | None, chunked: Size | None) -> None:
        """Record which tokens will be in last_token. Raises ValueError for a row without its input token."""
        staged = ticket.staged
        passes = [(staged.decode_arrays, decoded), (staged.chunk_arrays, chunked)]
        filled = [(inputs, size) for inputs, size in passes if size]
        for inputs, size in filled:
            self._arrays.check_unknown(inputs, size)
        for inputs, size in filled:
            self._arrays.note_sampled(inputs, size)
        self._arrays.note_host_sampled([ticket.slots[i] for i in (*ticket.host_rows, *ticket.masked_rows)])

    def _fill_decodes(self, ticket: CudaTicket) -> Size:
        count = ticket.plan.num_decodes
        return self._arrays.decodes(
            ticket.plan.rows[:count], ticket.slots[:count], ticket.bucket, ticket.staged.decode_arrays
        )

    def _fill_chunks(self, ticket: CudaTicket) -> Size:
        rows, slots = [ticket.plan.rows[i] for i in ticket.chunks], [ticket.slots[i] for i in ticket.chunks]
        return self._arrays.chunks(rows, slots, ticket.staged.chunk_arrays)

    def _submit_decodes(self, ticket: CudaTicket, size: Size) -> None:
        self._forward.plan_decodes(ticket.staged, size)
        if not ticket.one_pass:
            self._compute_decodes(ticket.bucket)

    def _submit_chunks(self, ticket: CudaTicket, size: Size) -> None:
        """Compute the chunks, with the decodes if they share a pass."""
        while not self._try_chunks(ticket, size):
            self._drop_largest_chunk(ticket)
            if not ticket.chunks:
                if ticket.one_pass:
                    self._compute_decodes(ticket.bucket)
                return
            size = self._fill_chunks(ticket)

    def _try_chunks(self, ticket: CudaTicket, size: Size) -> bool:
        compute = self._forward.mixed if ticket.one_pass else self._forward.chunks
        rows = [ticket.plan.rows[i] for i in ticket.chunks]
        scores = None
        try:
            if any(row.scored for row in rows):
                first = ticket.bucket if ticket.one_pass else 0
                scores = PassScores(rows, first, self.vocab_size, self._device)
            compute(ticket.staged, size, ticket.bucket, scores)
        except torch.OutOfMemoryError:
            return False
        ticket.scores = scores
        return True

    def _drop_largest_chunk(self, ticket: CudaTicket) -> None:
        """Drop the largest chunk, so that the others fit in memory."""
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
        self._stream.record_event().wait()  # its host arrays are filled again next
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _submit_fetch(self, ticket: CudaTicket) -> None:
        self._forward.fetch(ticket.staged, ticket.num_outputs)
        if ticket.scores is not None:
            ticket.scores.fetch()

    def _sample_masked(self, ticket: CudaTicket) -> dict[int, int]:
        """Sample the masked rows under their masks, behind the step, as soon as the masks are there.

        Return what stands for the token of each row, by output row, whose mask is not there.
        """
        masked, missing = ticket.fill_masks()
        self._stream.submit(partial(self._forward.sample_masked, ticket.staged, masked, ticket.bucket))
        self._stream.submit(partial(self._forward.fetch, ticket.staged, ticket.num_outputs))
        ticket.done_event = self._stream.record_event()
        return missing

    def _sample_on_host(
        self, ticket: CudaTicket, output_rows: dict[int, int], tokens: dict[int, int]
    ) -> dict[int, TokenLogprobs | None]:
        """Sample the tokens of the host rows from their logits into `tokens`, and return their logprobs."""
        host_rows = [i for i in ticket.host_rows if i in output_rows]
        rows = [ticket.plan.rows[i] for i in host_rows]
        if any(len(row.request.tokens) != row.start + row.count for row in rows):
            raise RuntimeError("a request that is sampled on the host advanced before its step was collected")
        logits = torch.empty(len(rows), self.vocab_size)
        for into, i in zip(logits, host_rows, strict=True):
            into.copy_(self._forward.logits[output_rows[i]])
        result = self._host_sampler.sample(logits, [row.request for row in rows], ticket.plan.masks)
        tokens.update(zip(host_rows, result.tokens, strict=True))
        return dict(zip(host_rows, result.logprobs or [None] * len(rows), strict=True))
