"""Passes of attention driven by hand: the arrays of a step, on the host and on the device, without a runner."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch

from daemon.engine.cuda.arrays import Inputs, Size, StepArrays
from daemon.engine.cuda.attention import Attention
from daemon.engine.cuda.forward import Buffer, Capacity, StagingSet, _packed
from daemon.engine.cuda.workspace import HeadShape
from daemon.engine.request import Request
from daemon.engine.runner import Row
from daemon.ipc.messages import RequestParams, SamplingParams


def blank_request(rid: int, length: int, table: list[int]) -> Request:
    params = RequestParams(SamplingParams(max_tokens=1, seed=0), 0.0)
    return Request(rid, 1, 0, params, [0] * length, length, block_table=table)


class Span(NamedTuple):
    """A sequence of `length` tokens. The last `num_new` tokens are computed."""

    length: int
    num_new: int = 1


class PassDriver:
    """The arrays of passes over one pool, on the host and on the device, as in a runner.

    Block tables are spread over the pool at random. `num_staging_sets`: number of sets of host buffers.
    """

    def __init__(
        self,
        heads: HeadShape,
        *,
        rows: int,
        max_len: int,
        tokens: int,
        num_staging_sets: int = 2,
        device: str = "cuda:0",
    ) -> None:
        self.heads = heads
        pages = rows * -(-max_len // heads.block_size)
        size, chunks = Size(rows, rows, rows, pages), Size(tokens, rows, rows, pages)
        room = Capacity(decodes=size, chunks=chunks, sampled=rows, vocab_size=1, slots=rows)
        self._device = device
        pinned = device != "cpu"
        self.staged = [StagingSet(staging_index, room, pinned=pinned) for staging_index in range(num_staging_sets)]
        self.pages = pages
        self._arrays = StepArrays(rows, max_len, heads.block_size)
        self._decodes, self._chunks = (
            Buffer(packed, torch.zeros(packed.nbytes, dtype=torch.uint8, device=device))
            for packed in (_packed(size), _packed(chunks))
        )
        self._turn = 0
        self._orders: dict[tuple[int, int], list[int]] = {}

    def rows(self, sequences: Sequence[Span], blocks: int, seed: int = 0) -> list[Row]:
        """Return a row for each sequence. Each one gets its own blocks of a pool of `blocks`."""
        if (blocks, seed) not in self._orders:
            self._orders[blocks, seed] = random.Random(seed).sample(range(1, blocks), blocks - 1)
        free = iter(self._orders[blocks, seed])
        made = []
        for rid, (length, count) in enumerate(sequences):
            table = [next(free) for _ in range(-(-length // self.heads.block_size))]
            made.append(Row(blank_request(rid, length, table), length - count, count, True))
        return made

    def prepare(self, attention: Attention, bucket: int) -> None:
        staged = self.staged[0]
        self._arrays.decodes([], [], bucket, staged.decode_arrays)
        attention.prepare(bucket, self._decodes.tensors, staged.decodes.tensors)

    def plan_decodes(self, attention: Attention, rows: Sequence[Row], bucket: int) -> Inputs:
        """Plan decodes of `rows`, padded to `bucket`, and return their inputs on the device."""
        staged = self._next()
        size = self._arrays.decodes(rows, range(1, len(rows) + 1), bucket, staged.decode_arrays)
        self._decodes.copy_from(staged.decodes, size.pages)
        attention.plan(
            staged.decodes.tensors, self._decodes.tensors, size, decode=True, staging_index=staged.staging_index
        )
        return self._decodes.tensors.cut(Size(bucket, bucket, bucket, self.pages))

    def plan_chunks(self, attention: Attention, rows: Sequence[Row]) -> Inputs:
        staged = self._next()
        size = self._arrays.chunks(rows, range(1, len(rows) + 1), staged.chunk_arrays)
        self._chunks.copy_from(staged.chunks, size.pages)
        inputs = self._chunks.tensors.cut(size)
        attention.plan(
            staged.chunks.tensors.cut(size), inputs, size, decode=False, staging_index=staged.staging_index
        )
        return inputs

    @property
    def current(self) -> StagingSet:
        """The staging set of the pass that was planned last."""
        return self.staged[self._turn % len(self.staged)]

    def _next(self) -> StagingSet:
        if self._device != "cpu":
            torch.cuda.synchronize()  # so the buffers of the pass before the last one are free
        self._turn += 1
        return self.current
