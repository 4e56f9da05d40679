"""Fills the arrays that FlashInfer and the model read on the device from a step plan. Numpy, no torch.

Data that changes little from step to step is stored per slot: block tables as rows of one array, which grow with the
requests' lists, and sampling parameters. So a decode step costs a few vector operations and one pass over the pages;
Python reads only token and start row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from daemon.engine.cuda.slots import DUMMY
from daemon.engine.jit import kernel
from daemon.engine.request import Request
from daemon.engine.runner import Row
from daemon.ipc.messages import SamplingParams

_NO_POSITION = -1
_UNKNOWN = -1  # token id: the device has the token


class Size(NamedTuple):
    """Number of entries of each array of an `Inputs` that a step fills."""

    tokens: int
    rows: int
    sampled: int
    pages: int


class Inputs(NamedTuple):
    """Inputs of one forward pass: numpy arrays on the host, tensors on the device. Block tables in CSR form.

    The pages of row i are ``kv_indices[kv_indptr[i] : kv_indptr[i + 1]]``. The last page holds `last_page_len[i]`
    tokens, including those of this step. The tokens of row i are ``[qo_indptr[i], qo_indptr[i + 1])``.
    """

    tokens: Any  # int32[tokens] ids to embed; negative: use last_token of the row's slot
    positions: Any  # int32[tokens] position of each token in its sequence
    rows: Any  # int32[tokens] row of each token
    slots: Any  # int64[rows]
    qo_indptr: Any  # int32[rows + 1]
    kv_indptr: Any  # int32[rows + 1]
    last_page_len: Any  # int32[rows], 1 to block_size
    kv_lens: Any  # int32[rows] tokens of each sequence, including those of this step
    logits_indices: Any  # int64[sampled] index of the token that gives the logits
    sampled_slots: Any  # int64[sampled] slot of each sampled token
    inverse_temperature: Any  # float32[sampled], 0: greedy
    min_p_depth: Any  # float32[sampled]
    top_k: Any  # int32[sampled], 0: all
    top_p: Any  # float64[sampled]
    seed: Any  # int64[sampled], the bits of a uint64
    sample_position: Any  # int32[sampled] position of the new token
    kv_indices: Any  # int32[pages]

    def cut(self, size: Size) -> Inputs:
        """Return views of the part that a step of `size` fills."""
        lengths = size._asdict()
        return Inputs(
            *(
                array[: lengths[counted] + extra]
                for array, (_, counted, extra) in zip(self, _SHAPES.values(), strict=True)
            )
        )


# name -> dtype, the field of Size that counts its entries, entries more than that
_SHAPES = {
    "tokens": ("int32", "tokens", 0),
    "positions": ("int32", "tokens", 0),
    "rows": ("int32", "tokens", 0),
    "slots": ("int64", "rows", 0),
    "qo_indptr": ("int32", "rows", 1),
    "kv_indptr": ("int32", "rows", 1),
    "last_page_len": ("int32", "rows", 0),
    "kv_lens": ("int32", "rows", 0),
    "logits_indices": ("int64", "sampled", 0),
    "sampled_slots": ("int64", "sampled", 0),
    "inverse_temperature": ("float32", "sampled", 0),
    "min_p_depth": ("float32", "sampled", 0),
    "top_k": ("int32", "sampled", 0),
    "top_p": ("float64", "sampled", 0),
    "seed": ("int64", "sampled", 0),
    "sample_position": ("int32", "sampled", 0),
    "kv_indices": ("int32", "pages", 0),
}


def input_fields(size: Size) -> list[tuple[str, str, int]]:
    """Return (name, dtype, length) of the arrays of an `Inputs` that holds `size`. The pages come last."""
    lengths = size._asdict()
    return [(name, dtype, lengths[counted] + extra) for name, (dtype, counted, extra) in _SHAPES.items()]


class SlotSampling(NamedTuple):
    """Sampling parameters of a request in the form that the device reads; the same at each position."""

    inverse_temperature: float
    min_p_depth: float
    top_k: int
    top_p: float
    seed: int  # as int64


def _is_adjusted(sampling: SamplingParams) -> bool:
    return bool(
        sampling.logprobs >= 0
        or sampling.logit_bias
        or sampling.allowed_token_ids
        or sampling.bad_words
        or sampling.repetition_penalty != 1.0
        or sampling.presence_penalty
        or sampling.frequency_penalty
    )


@kernel("void(int32[:, ::1], int64[::1], int32[::1], int32[::1])")
def _gather_pages(tables: np.ndarray, slots: np.ndarray, indptr: np.ndarray, out: np.ndarray) -> None:
    """Copy the first pages of each slot's table, row by row, into `out` (int32[pages])."""
    for i in range(len(slots)):
        start = indptr[i]
        table = tables[slots[i]]
        for j in range(indptr[i + 1] - start):
            out[start + j] = table[j]


class StepArrays:
    """Fills the arrays of steps over slots 1..`slots`. Slot 0 is the dummy for padding rows.

    `max_len`: length of the longest sequence in tokens.
    """

    def __init__(self, slots: int, max_len: int, block_size: int) -> None:
        self._block_size = block_size
        self._max_len = max_len
        self._tables = np.zeros((slots + 1, -(-max_len // block_size)), np.int32)
        self._lists: list[list[int] | None] = [None] * (slots + 1)  # the block table that each row of _tables copies
        self._known = np.zeros(slots + 1, np.int32)  # entries copied so far
        self._inverse_temperature = np.zeros(slots + 1, np.float32)
        self._min_p_depth = np.full(slots + 1, -np.inf, np.float32)
        self._top_k = np.zeros(slots + 1, np.int32)
        self._top_p = np.ones(slots + 1, np.float64)
        self._seed = np.zeros(slots + 1, np.int64)
        self._on_host = np.zeros(slots + 1, bool)  # sampled on the host: penalties, bias or logprobs
        self._masked = np.zeros(slots + 1, bool)  # sampled under a mask, on the device if not on the host
        self._host_below = np.zeros(slots + 1, np.int64)  # sampled on the host at positions below this (min_tokens)
        self._sampled_at = np.full(slots + 1, _NO_POSITION, np.int32)  # position of the token in last_token

    def assign_slot(self, slot: int, request: Request, params: SlotSampling) -> None:
        """Give `slot` to `request`, which samples with the parameters `params`."""
        sampling = request.sampling
        self._lists[slot] = None
        self._known[slot] = 0
        self._sampled_at[slot] = _NO_POSITION
        self._inverse_temperature[slot] = params.inverse_temperature
        self._min_p_depth[slot] = params.min_p_depth
        self._top_k[slot] = params.top_k
        self._top_p[slot] = params.top_p
        self._seed[slot] = params.seed
        self._on_host[slot] = _is_adjusted(sampling)
        self._masked[slot] = bool(sampling.grammar)
        self._host_below[slot] = request.prompt_len + sampling.min_tokens if sampling.min_tokens > 0 else 0

    def decodes(self, rows: Sequence[Row], slots: Sequence[int], bucket: int, into: Inputs) -> Size:
        """Fill rows of one token each, padded to `bucket` rows with dummies: token 0 at position 0 of block 0.

        Raises ValueError for a row that does not fit its block table, or that is not a decode.
        """
        count = len(rows)
        if [row[2] for row in rows].count(1) < count:
            raise ValueError("a decode row computes one token")
        requests, firsts = [row[0] for row in rows], [row[1] for row in rows]
        starts = np.zeros(bucket, np.int32)
        starts[:count] = firsts
        row_slots = np.full(bucket, DUMMY, np.int64)
        row_slots[:count] = slots
        known = [request.tokens for request in requests]
        into.tokens[:count] = [
            tokens[start] if start < len(tokens) else _UNKNOWN for tokens, start in zip(known, firsts, strict=True)
        ]
        into.tokens[count:bucket] = 0
        into.positions[:bucket] = starts
        every = np.arange(bucket + 1, dtype=np.int32)
        into.rows[:bucket] = every[:bucket]
        into.qo_indptr[: bucket + 1] = every
        into.slots[:bucket] = row_slots
        pages = self._fill_pages(requests, slots, row_slots, starts + 1, into)
        into.logits_indices[:bucket] = every[:bucket]
        self._fill_sampling(row_slots, starts + 1, into)
        return Size(bucket, bucket, bucket, pages)

    def chunks(self, rows: Sequence[Row], slots: Sequence[int], into: Inputs) -> Size:
        """Fill rows of any number of tokens. Raises ValueError for a row that does not fit its block table."""
        count = len(rows)
        starts = np.array([row[1] for row in rows], np.int32)
        counts = np.array([row[2] for row in rows], np.int32)
        row_slots = np.array(slots, np.int64)
        into.qo_indptr[0] = 0
        np.cumsum(counts, out=into.qo_indptr[1 : count + 1])
        total = int(into.qo_indptr[count])
        into.tokens[:total] = np.fromiter(chain.from_iterable(_tokens(row) for row in rows), np.int32, total)
        into.rows[:total] = np.repeat(np.arange(count, dtype=np.int32), counts)
        into.positions[:total] = np.arange(total, dtype=np.int32) + np.repeat(starts - into.qo_indptr[:count], counts)
        into.slots[:count] = row_slots
        pages = self._fill_pages([row[0] for row in rows], slots, row_slots, starts + counts, into)
        sampled = np.flatnonzero([row[3] for row in rows])
        into.logits_indices[: len(sampled)] = into.qo_indptr[1 : count + 1][sampled] - 1
        self._fill_sampling(row_slots[sampled], (starts + counts)[sampled], into)
        return Size(total, count, len(sampled), pages)

    def host_rows(self, rows: Sequence[Row], slots: Sequence[int]) -> list[int]:
        """Return the indices of the rows that must be sampled on the host."""
        row_slots = np.array(slots, np.int64)
        below = self._host_below[row_slots]
        candidates = self._on_host[row_slots] | (below > 0)
        if not candidates.any():
            return []
        return [
            i
            for i in np.flatnonzero(candidates).tolist()
            if rows[i].sample and (self._on_host[row_slots[i]] or rows[i].start + rows[i].count < below[i])
        ]

    def masked_rows(self, rows: Sequence[Row], slots: Sequence[int], host_rows: Sequence[int]) -> list[int]:
        """Return the indices of the rows that are sampled on the device under a mask."""
        masked = self._masked[np.array(slots, np.int64)]
        return [i for i in np.flatnonzero(masked).tolist() if rows[i].sample and i not in host_rows]

    def note_sampled(self, inputs: Inputs, size: Size) -> None:
        """Record that the pass of `inputs` writes the tokens it samples to last_token."""
        self._sampled_at[inputs.sampled_slots[: size.sampled]] = inputs.sample_position[: size.sampled]

    def note_host_sampled(self, slots: Sequence[int]) -> None:
        """Record that the host samples the tokens of `slots`: their entries in last_token are invalid."""
        self._sampled_at[list(slots)] = _NO_POSITION

    def check_unknown(self, inputs: Inputs, size: Size) -> None:
        """Raise ValueError for a token that is neither known to the host nor in last_token."""
        unknown = np.flatnonzero(inputs.tokens[: size.tokens] < 0)
        if not len(unknown):
            return
        row_slots = inputs.slots[inputs.rows[unknown]]
        missing = self._sampled_at[row_slots] != inputs.positions[unknown]
        if missing.any():
            raise ValueError(
                f"no step in flight samples the tokens at positions "
                f"{inputs.positions[unknown][missing].tolist()} on the device: collect before launching"
            )

    def _fill_pages(
        self,
        requests: Sequence[Request],
        slots: Sequence[int],
        row_slots: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int32],
        into: Inputs,
    ) -> int:
        """Update the copies of the block tables and write the pages of sequences of `lengths`; return their number.

        A block table only grows at its end. Any other change replaces the list object, which this detects.
        """
        rows = len(row_slots)
        needed = (lengths + (self._block_size - 1)) // self._block_size
        lists = self._lists
        for slot, request in zip(slots, requests, strict=True):
            if lists[slot] is not request.block_table:
                lists[slot] = request.block_table
                self._known[slot] = 0
        for i in np.flatnonzero(self._known[row_slots[: len(slots)]] < needed[: len(slots)]).tolist():
            self._copy_table(slots[i], requests[i], int(lengths[i]))
        into.kv_lens[:rows] = lengths
        into.last_page_len[:rows] = lengths - (needed - 1) * self._block_size
        indptr = into.kv_indptr[: rows + 1]
        indptr[0] = 0
        np.cumsum(needed, out=indptr[1:])
        pages = int(indptr[rows])
        _gather_pages(self._tables, row_slots, indptr, into.kv_indices)
        return pages

    def _copy_table(self, slot: int, request: Request, length: int) -> None:
        table = request.block_table
        if len(table) * self._block_size < length or length > self._max_len:
            raise ValueError(
                f"request {request.rid} has {len(table)} blocks and a limit of {self._max_len} tokens: "
                f"no room for {length}"
            )
        known, count = int(self._known[slot]), min(len(table), self._tables.shape[1])
        self._tables[slot, known:count] = table[known:count]
        self._known[slot] = count

    def _fill_sampling(
        self, row_slots: npt.NDArray[np.int64], positions: npt.NDArray[np.int32], into: Inputs
    ) -> None:
        count = len(row_slots)
        into.sampled_slots[:count] = row_slots
        into.sample_position[:count] = positions
        self._inverse_temperature.take(row_slots, out=into.inverse_temperature[:count])
        self._min_p_depth.take(row_slots, out=into.min_p_depth[:count])
        self._top_k.take(row_slots, out=into.top_k[:count])
        self._top_p.take(row_slots, out=into.top_p[:count])
        self._seed.take(row_slots, out=into.seed[:count])


def _tokens(row: Row) -> list[int]:
    """Return the tokens of a chunk. The last one may be known to the device only."""
    known = row.request.tokens[row.start : row.start + row.count]
    return known + [_UNKNOWN] * (row.count - len(known))
