"""A step plan as the arrays that FlashInfer and the model read on the device. Numpy, no torch.

What changes little from step to step is kept by slot: block tables as rows of one array, which grow with their
requests' lists, and sampling parameters. A decode step then costs some vector operations and one pass over the
pages; only what differs from row to row in Python, token and start, is read row by row.
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

_NOWHERE = -1  # no position
_UNKNOWN = -1  # no token: the device has it


class Size(NamedTuple):
    """How much of each array of an `Inputs` a step fills."""

    tokens: int
    rows: int
    sampled: int
    pages: int


class Inputs(NamedTuple):
    """One forward pass: numpy arrays on the host, tensors on the device. Block tables in CSR form.

    Row i's pages are ``kv_indices[kv_indptr[i] : kv_indptr[i + 1]]``, the last of which holds `last_page_len[i]`
    tokens, the row's own among them; its tokens are ``[qo_indptr[i], qo_indptr[i + 1])``.
    """

    tokens: Any  # int32[tokens] ids to embed; negative: what last_token holds for the row's slot
    positions: Any  # int32[tokens] place of each in its sequence
    rows: Any  # int32[tokens] row of each
    slots: Any  # int64[rows]
    qo_indptr: Any  # int32[rows + 1]
    kv_indptr: Any  # int32[rows + 1]
    last_page_len: Any  # int32[rows], 1 to block_size
    kv_lens: Any  # int32[rows] tokens of each sequence, with those of this step
    ends: Any  # int64[sampled] token whose logits are wanted
    drawn_slots: Any  # int64[sampled] slot that each drawn token belongs to
    inverse_temperature: Any  # float32[sampled], 0: greedy
    min_p_depth: Any  # float32[sampled]
    top_k: Any  # int32[sampled], 0: all
    top_p: Any  # float64[sampled]
    seed: Any  # int64[sampled], the bits of a uint64
    draw_position: Any  # int32[sampled] place of the new token
    kv_indices: Any  # int32[pages]

    def cut(self, size: Size) -> Inputs:
        """The part that a step of `size` fills: views."""
        lengths = size._asdict()
        return Inputs(
            *(
                array[: lengths[counted] + extra]
                for array, (_, counted, extra) in zip(self, _SHAPES.values(), strict=True)
            )
        )


# name -> dtype, what is counted, one more than that
_SHAPES = {
    "tokens": ("int32", "tokens", 0),
    "positions": ("int32", "tokens", 0),
    "rows": ("int32", "tokens", 0),
    "slots": ("int64", "rows", 0),
    "qo_indptr": ("int32", "rows", 1),
    "kv_indptr": ("int32", "rows", 1),
    "last_page_len": ("int32", "rows", 0),
    "kv_lens": ("int32", "rows", 0),
    "ends": ("int64", "sampled", 0),
    "drawn_slots": ("int64", "sampled", 0),
    "inverse_temperature": ("float32", "sampled", 0),
    "min_p_depth": ("float32", "sampled", 0),
    "top_k": ("int32", "sampled", 0),
    "top_p": ("float64", "sampled", 0),
    "seed": ("int64", "sampled", 0),
    "draw_position": ("int32", "sampled", 0),
    "kv_indices": ("int32", "pages", 0),
}


def input_fields(size: Size) -> list[tuple[str, str, int]]:
    """(name, dtype, length) of the arrays of an `Inputs` with room for `size`, the pages last."""
    room = size._asdict()
    return [(name, dtype, room[counted] + extra) for name, (dtype, counted, extra) in _SHAPES.items()]


class DrawParams(NamedTuple):
    """What a device's draws read of a request, the same at each position."""

    inverse_temperature: float
    min_p_depth: float
    top_k: int
    top_p: float
    seed: int  # as int64


def _is_adjusted(sampling: SamplingParams) -> bool:
    return bool(
        sampling.logprobs >= 0
        or sampling.logit_bias
        or sampling.repetition_penalty != 1.0
        or sampling.presence_penalty
        or sampling.frequency_penalty
    )


@kernel("void(int32[:, ::1], int64[::1], int32[::1], int32[::1])")
def _gather_pages(tables: np.ndarray, slots: np.ndarray, indptr: np.ndarray, out: np.ndarray) -> None:
    """Row by row, the beginnings of the slots' tables, into `out` (int32[pages])."""
    for i in range(len(slots)):
        start = indptr[i]
        table = tables[slots[i]]
        for j in range(indptr[i + 1] - start):
            out[start + j] = table[j]


class StepArrays:
    """Fills the arrays of steps over slots 1..`slots`; slot 0 is the dummy, which stands for padding.

    `max_len`: longest sequence in tokens.
    """

    def __init__(self, slots: int, max_len: int, block_size: int) -> None:
        self._block_size = block_size
        self._max_len = max_len
        self._tables = np.zeros((slots + 1, -(-max_len // block_size)), np.int32)
        self._lists: list[list[int] | None] = [None] * (slots + 1)  # what each row of _tables is a copy of
        self._known = np.zeros(slots + 1, np.int32)  # entries of it
        self._inverse_temperature = np.zeros(slots + 1, np.float32)
        self._min_p_depth = np.full(slots + 1, -np.inf, np.float32)
        self._top_k = np.zeros(slots + 1, np.int32)
        self._top_p = np.ones(slots + 1, np.float64)
        self._seed = np.zeros(slots + 1, np.int64)
        self._on_host = np.zeros(slots + 1, bool)  # penalties, bias or logprobs: its draws are the host's
        self._host_below = np.zeros(slots + 1, np.int64)  # so are the draws at positions below this (min_tokens)
        self._drawn_at = np.full(slots + 1, _NOWHERE, np.int32)  # position of the token in last_token

    def adopt(self, slot: int, request: Request, draw: DrawParams) -> None:
        """`request` has `slot` from now on, and draws by `draw`."""
        sampling = request.sampling
        self._lists[slot] = None
        self._known[slot] = 0
        self._drawn_at[slot] = _NOWHERE
        self._inverse_temperature[slot] = draw.inverse_temperature
        self._min_p_depth[slot] = draw.min_p_depth
        self._top_k[slot] = draw.top_k
        self._top_p[slot] = draw.top_p
        self._seed[slot] = draw.seed
        self._on_host[slot] = _is_adjusted(sampling)
        self._host_below[slot] = request.prompt_len + sampling.min_tokens if sampling.min_tokens > 0 else 0

    def decodes(self, rows: Sequence[Row], slots: Sequence[int], bucket: int, into: Inputs) -> Size:
        """Rows of one token each, and dummies up to `bucket` of them: token 0 at position 0 of block 0.

        Raises ValueError for a row that its block table has no room for, or that is no decode.
        """
        count = len(rows)
        if [row[2] for row in rows].count(1) < count:
            raise ValueError("a decode row computes one token")
        requests, firsts = [row[0] for row in rows], [row[1] for row in rows]
        starts = np.zeros(bucket, np.int32)
        starts[:count] = firsts
        places = np.full(bucket, DUMMY, np.int64)
        places[:count] = slots
        known = [request.tokens for request in requests]
        into.tokens[:count] = [
            tokens[start] if start < len(tokens) else _UNKNOWN for tokens, start in zip(known, firsts, strict=True)
        ]
        into.tokens[count:bucket] = 0
        into.positions[:bucket] = starts
        every = np.arange(bucket + 1, dtype=np.int32)
        into.rows[:bucket] = every[:bucket]
        into.qo_indptr[: bucket + 1] = every
        into.slots[:bucket] = places
        pages = self._follow(requests, slots, places, starts + 1, into)
        into.ends[:bucket] = every[:bucket]
        self._draws(places, starts + 1, into)
        return Size(bucket, bucket, bucket, pages)

    def chunks(self, rows: Sequence[Row], slots: Sequence[int], into: Inputs) -> Size:
        """Rows of any number of tokens. Raises ValueError for one that its block table has no room for."""
        count = len(rows)
        starts = np.array([row[1] for row in rows], np.int32)
        counts = np.array([row[2] for row in rows], np.int32)
        places = np.array(slots, np.int64)
        into.qo_indptr[0] = 0
        np.cumsum(counts, out=into.qo_indptr[1 : count + 1])
        total = int(into.qo_indptr[count])
        into.tokens[:total] = np.fromiter(chain.from_iterable(_tokens(row) for row in rows), np.int32, total)
        into.rows[:total] = np.repeat(np.arange(count, dtype=np.int32), counts)
        into.positions[:total] = np.arange(total, dtype=np.int32) + np.repeat(starts - into.qo_indptr[:count], counts)
        into.slots[:count] = places
        pages = self._follow([row[0] for row in rows], slots, places, starts + counts, into)
        sampled = np.flatnonzero([row[3] for row in rows])
        into.ends[: len(sampled)] = into.qo_indptr[1 : count + 1][sampled] - 1
        self._draws(places[sampled], (starts + counts)[sampled], into)
        return Size(total, count, len(sampled), pages)

    def on_host(self, rows: Sequence[Row], slots: Sequence[int]) -> list[int]:
        """Indices of the rows whose tokens the host must draw."""
        places = np.array(slots, np.int64)
        below = self._host_below[places]
        mine = self._on_host[places] | (below > 0)
        if not mine.any():
            return []
        return [
            i
            for i in np.flatnonzero(mine).tolist()
            if rows[i].sample and (self._on_host[places[i]] or rows[i].start + rows[i].count < below[i])
        ]

    def note_drawn(self, inputs: Inputs, size: Size) -> None:
        """A pass has been launched that leaves the tokens it draws in last_token."""
        self._drawn_at[inputs.drawn_slots[: size.sampled]] = inputs.draw_position[: size.sampled]

    def note_hosted(self, slots: Sequence[int]) -> None:
        """The host draws the tokens of `slots`: what the pass leaves there counts for nothing."""
        self._drawn_at[list(slots)] = _NOWHERE

    def check_unknown(self, inputs: Inputs, size: Size) -> None:
        """Raises ValueError for a token that is neither known to the host nor in last_token."""
        unknown = np.flatnonzero(inputs.tokens[: size.tokens] < 0)
        if not len(unknown):
            return
        places = inputs.slots[inputs.rows[unknown]]
        lost = self._drawn_at[places] != inputs.positions[unknown]
        if lost.any():
            raise ValueError(
                f"no step in flight draws the tokens at positions "
                f"{inputs.positions[unknown][lost].tolist()} on the device: collect before launching"
            )

    def _follow(
        self,
        requests: Sequence[Request],
        slots: Sequence[int],
        places: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int32],
        into: Inputs,
    ) -> int:
        """Bring the rows' tables up to date and write their pages, for sequences of `lengths`; returns how many.

        A block table only ever grows at its end; whoever changes it otherwise puts another list in its place.
        """
        rows = len(places)
        needed = (lengths + (self._block_size - 1)) // self._block_size
        lists = self._lists
        for slot, request in zip(slots, requests, strict=True):
            if lists[slot] is not request.block_table:
                lists[slot] = request.block_table
                self._known[slot] = 0
        for i in np.flatnonzero(self._known[places[: len(slots)]] < needed[: len(slots)]).tolist():
            self._grow(slots[i], requests[i], int(lengths[i]))
        into.kv_lens[:rows] = lengths
        into.last_page_len[:rows] = lengths - (needed - 1) * self._block_size
        indptr = into.kv_indptr[: rows + 1]
        indptr[0] = 0
        np.cumsum(needed, out=indptr[1:])
        pages = int(indptr[rows])
        _gather_pages(self._tables, places, indptr, into.kv_indices)
        return pages

    def _grow(self, slot: int, request: Request, length: int) -> None:
        table = request.block_table
        if len(table) * self._block_size < length or length > self._max_len:
            raise ValueError(
                f"request {request.rid} has {len(table)} blocks and a limit of {self._max_len} tokens: "
                f"no room for {length}"
            )
        known, count = int(self._known[slot]), min(len(table), self._tables.shape[1])
        self._tables[slot, known:count] = table[known:count]
        self._known[slot] = count

    def _draws(self, places: npt.NDArray[np.int64], positions: npt.NDArray[np.int32], into: Inputs) -> None:
        count = len(places)
        into.drawn_slots[:count] = places
        into.draw_position[:count] = positions
        self._inverse_temperature.take(places, out=into.inverse_temperature[:count])
        self._min_p_depth.take(places, out=into.min_p_depth[:count])
        self._top_k.take(places, out=into.top_k[:count])
        self._top_p.take(places, out=into.top_p[:count])
        self._seed.take(places, out=into.seed[:count])


def _tokens(row: Row) -> list[int]:
    """Those of a chunk; the last may be on the device alone."""
    known = row.request.tokens[row.start : row.start + row.count]
    return known + [_UNKNOWN] * (row.count - len(known))
