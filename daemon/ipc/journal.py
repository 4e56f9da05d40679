"""The journal: one frontend's record of all its requests, in shared memory.

Only the owning frontend writes it; engines and the coordinator map it read-only. It contains everything that another
engine needs to continue a request from the last token that the frontend has accepted: parameters, prompt, seed,
epoch, owner, the logprobs of the prompt, and the accepted output with its logprobs. At admission it reserves the
space for all of max_tokens.

It outlives its frontend: a successor can adopt it. The owner may die at any store, so each change is committed by
one aligned store, and a slot that was not committed counts as free.

The segment begins with one word, the *generation*: the incarnation of the frontend that has begun with an empty
journal; 0 while that one empties it. At byte 64 begin the slots. A slot is sixteen u64 words:

    0   request id
    1   epoch << 32 | owner << 16 | which << 8 | state      (one store commits all of them)
    2   output tokens accepted
    3   params offset << 32 | params length, bytes
    4   prompt offset << 32 | prompt length, tokens
    5   output offset << 32 | output capacity, tokens
    6   logprobs offset << 32 | bytes of one token's logprob record (0: none)
    7   incarnation of the owner if `which` is 0
    8   incarnation of the owner if `which` is 1
    9   priority as it is now, two's complement (params contain the priority at admission)
    10  prompt tokens from the prefix cache << 32 | failure << 16 | finish
    11  epoch of the last crash << 32 | engines that failed << 16 | engines that crashed
    12  weights of the owner if `which` is 0
    13  weights of the owner if `which` is 1
    14  offset of the prompt's logprobs << 32 | bytes of one record of them (0: none)
    15  records accepted of the prompt's logprobs

Offsets count from the start of the segment, in bytes. Prompt and output are u32 arrays. A logprob record is
f32 of the chosen token, then (u32 id, f32 logprob) for each alternative; unused alternatives have id 2^32-1. The
records of the prompt's logprobs are in `prompt_logprobs`.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from enum import IntEnum
from math import isnan
from typing import NamedTuple

from daemon.ipc.arena import ALIGN, Arena, rounded
from daemon.ipc.messages import Finish, RequestParams, SamplingParams, TokenLogprobs, decode_params, encode
from daemon.ipc.prompt_logprobs import PromptLogprob, PromptLogprobs, record_bytes, unpack

HEADER_BYTES = 64
SLOT_WORDS = 16
_NO_OWNER = 0xFFFF
_NO_TOKEN = 0xFFFFFFFF
_U64 = (1 << 64) - 1
_WHICH = 1 << 8  # bit of word 1


class SlotState(IntEnum):
    """The state of a slot.

    FREE: can be reused; LIVE: belongs to an unfinished request; ENDED: the request has ended, and not all of its
    output is delivered; CLOSED: the slot is being freed.
    """

    FREE = 0
    LIVE = 1
    CLOSED = 2
    ENDED = 3


class Failure(IntEnum):
    """Which error has ended a request; NONE: it has its `Finish`."""

    NONE = 0
    LOST = 1  # its engine died or gave up; another try may succeed
    REFUSED = 2  # another try would fail the same
    SHUTDOWN = 3  # the daemon ends


class Crashes(NamedTuple):
    """The crashes that a request has been through."""

    epoch: int = 0  # of the last one; 0: none
    failed: int = 0  # engines that ended by an exception of their own
    crashed: int = 0  # all engines that crashed, those that failed included


class JournalFull(Exception):
    """There is no free slot or no contiguous space for the request's reservation now."""


class JournalTooSmall(Exception):
    """The reservation does not fit an empty journal."""


def slots_for(size: int) -> int:
    """Return the number of slots in a journal of `size` bytes: one per 4 KiB, so that space runs out before slots."""
    return size // (4 << 10)


def _slots_end(num_slots: int) -> int:
    return HEADER_BYTES + num_slots * SLOT_WORDS * 8


class Layout(NamedTuple):
    """Where the parts of a request are in its reservation, and how large it is. In bytes."""

    tokens_at: int
    output_at: int
    prompt_logprobs_at: int
    prompt_record: int  # of one prompt token's logprobs
    logprobs_at: int
    record: int  # of one output token's logprobs
    size: int


def layout(params_len: int, prompt_len: int, sampling: SamplingParams) -> Layout:
    """Lay out the reservation of a request. `params_len` in bytes."""
    record = 0 if sampling.logprobs < 0 else 4 + 8 * sampling.logprobs
    prompt_record = record_bytes(sampling.prompt_logprobs)
    tokens_at = rounded(params_len)
    output_at = tokens_at + 4 * prompt_len
    prompt_logprobs_at = output_at + 4 * sampling.max_tokens
    logprobs_at = prompt_logprobs_at + prompt_record * max(0, prompt_len - 1)
    size = logprobs_at + record * sampling.max_tokens
    return Layout(tokens_at, output_at, prompt_logprobs_at, prompt_record, logprobs_at, record, size)


class JournalView:
    """Read access to a journal, for engines and the coordinator."""

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self.num_slots = slots_for(len(view))
        self._header = view[:8].cast("Q")
        self._words = view[HEADER_BYTES : _slots_end(self.num_slots)].cast("Q")
        self._u32 = view[: len(view) & -4].cast("I")

    @property
    def generation(self) -> int:
        """Incarnation of the frontend that has begun with an empty journal; 0 if none has."""
        return int(self._header[0])

    def rid(self, slot: int) -> int:
        """Return the request id in the slot (meaningless if it is FREE)."""
        return int(self._words[slot * SLOT_WORDS])

    def epoch(self, slot: int) -> int:
        return int(self._words[slot * SLOT_WORDS + 1]) >> 32

    def owner(self, slot: int) -> tuple[int, int]:
        """Return (engine index, its incarnation) of the request's owner."""
        base = slot * SLOT_WORDS
        word = int(self._words[base + 1])
        return word >> 16 & 0xFFFF, int(self._words[base + (8 if word & _WHICH else 7)])

    def weights(self, slot: int) -> int:
        """Return what identifies the weights of the owner; 0 if it is not known."""
        base = slot * SLOT_WORDS
        return int(self._words[base + (13 if self._words[base + 1] & _WHICH else 12)])

    def state(self, slot: int) -> SlotState:
        return SlotState(self._words[slot * SLOT_WORDS + 1] & 0xFF)

    def num_output(self, slot: int) -> int:
        return int(self._words[slot * SLOT_WORDS + 2])

    def priority(self, slot: int) -> int:
        """Return the current priority; `params` contains the one at admission."""
        word = int(self._words[slot * SLOT_WORDS + 9])
        return word - (word >> 63 << 64)

    def finish(self, slot: int) -> Finish:
        """Return how the request has ended; NONE if it has not, or has ended with an error."""
        return Finish(self._words[slot * SLOT_WORDS + 10] & 0xFFFF)

    def failure(self, slot: int) -> Failure:
        return Failure(self._words[slot * SLOT_WORDS + 10] >> 16 & 0xFFFF)

    def num_cached_tokens(self, slot: int) -> int:
        """Return the number of prompt tokens that came from the prefix cache, as far as output has told it."""
        return int(self._words[slot * SLOT_WORDS + 10]) >> 32

    def crashes(self, slot: int) -> Crashes:
        word = int(self._words[slot * SLOT_WORDS + 11])
        return Crashes(word >> 32, word >> 16 & 0xFFFF, word & 0xFFFF)

    def prompt_len(self, slot: int) -> int:
        return int(self._words[slot * SLOT_WORDS + 4]) & 0xFFFFFFFF

    def params(self, slot: int) -> RequestParams:
        offset, length = self._pair(slot, 3)
        return decode_params(self._view[offset : offset + length])

    def prompt(self, slot: int) -> list[int]:
        return self._tokens(slot, 4, self.prompt_len(slot))

    def output(self, slot: int, start: int = 0) -> list[int]:
        """Return the accepted output tokens from position `start` on."""
        offset, _ = self._pair(slot, 5)
        return self._u32[offset // 4 + start : offset // 4 + self.num_output(slot)].tolist()

    def logprobs(self, slot: int, position: int) -> TokenLogprobs | None:
        """Return the logprobs of the accepted output token at `position`; None if its engine has sent none."""
        offset, record = self._pair(slot, 6)
        if not record:
            return None
        return _unpack_logprobs(self._view[offset + position * record : offset + (position + 1) * record])

    def num_prompt_logprobs(self, slot: int) -> int:
        """Return the number of accepted records of the prompt's logprobs."""
        return int(self._words[slot * SLOT_WORDS + 15])

    def prompt_logprobs(self, slot: int, start: int, stop: int) -> list[PromptLogprob]:
        """Return records [start, stop) of the prompt's logprobs, which must be accepted."""
        offset, record = self._pair(slot, 14)
        return unpack(self._view[offset + start * record : offset + stop * record], record)

    def live_slots(self) -> list[int]:
        """Return the slots of all LIVE requests."""
        return self._slots_in(SlotState.LIVE)

    def kept_slots(self) -> list[int]:
        """Return the slots of the requests that are LIVE or ENDED."""
        return self._slots_in(SlotState.LIVE, SlotState.ENDED)

    def _slots_in(self, *wanted: int) -> list[int]:
        states = self._words[1::SLOT_WORDS].tolist()  # one bulk read: every status request calls this
        return [slot for slot, word in enumerate(states) if word & 0xFF in wanted]

    def _pair(self, slot: int, word: int) -> tuple[int, int]:
        value = int(self._words[slot * SLOT_WORDS + word])
        return value >> 32, value & 0xFFFFFFFF

    def _tokens(self, slot: int, word: int, count: int) -> list[int]:
        offset, _ = self._pair(slot, word)
        return self._u32[offset // 4 : offset // 4 + count].tolist()


class Journal(JournalView):
    """The owning frontend's journal."""

    def __init__(self, view: memoryview, *, adopt: bool = False, generation: int = 0) -> None:
        """`adopt`: keep the requests that a predecessor has left, and its generation. Otherwise, or if there is
        nothing to adopt, start empty. `generation`: incarnation of this frontend, for an empty journal."""
        super().__init__(view)
        self._arena_offset = rounded(_slots_end(self.num_slots))
        self._capacity = len(view) - self._arena_offset & -ALIGN
        self._arena = Arena(self._capacity)
        self._reserved: dict[int, tuple[int, int]] = {}  # slot -> extent
        if not (adopt and self.generation):
            self._discard(generation)
        self._keep()

    def _discard(self, generation: int) -> None:
        """Free every slot. A successor does not adopt a journal that is only partly discarded."""
        self._header[0] = 0
        for slot in range(self.num_slots):
            self._words[slot * SLOT_WORDS + 1] = SlotState.FREE
        self._header[0] = generation

    def _keep(self) -> None:
        """Reserve the space of all requests. Free the slots that the predecessor was opening or closing."""
        kept = set()
        for slot in self.kept_slots():
            if self.owner(slot)[0] != _NO_OWNER:
                kept.add(slot)
                self._reserved[slot] = self._extent(slot)
                self._arena.reserve(*self._reserved[slot])
        self._free_slots = [slot for slot in range(self.num_slots - 1, -1, -1) if slot not in kept]
        for slot in self._free_slots:
            self._words[slot * SLOT_WORDS + 1] = SlotState.FREE

    def _extent(self, slot: int) -> tuple[int, int]:
        """Return the part of the arena that the request has reserved, as its slot tells it."""
        start, _ = self._pair(slot, 3)
        _, capacity = self._pair(slot, 5)
        logprobs_at, record = self._pair(slot, 6)
        return start - self._arena_offset, logprobs_at + record * capacity - start

    def open(self, rid: int, params: RequestParams, prompt: Sequence[int]) -> int:
        """Record a request, reserve all the space it can need and return its slot, at epoch 0 and without an owner.

        Raises JournalFull (a later try can succeed) or JournalTooSmall (no try can succeed).
        """
        sampling = params.sampling
        blob = encode(params)
        parts = layout(len(blob), len(prompt), sampling)
        slot, start = self._reserve(parts.size)
        at = self._arena_offset + start
        self._view[at : at + len(blob)] = blob
        packed = prompt if isinstance(prompt, array) and prompt.typecode == "I" else array("I", prompt)
        self._view[at + parts.tokens_at : at + parts.output_at] = packed.tobytes()
        base = slot * SLOT_WORDS
        self._words[base] = rid
        self._words[base + 2] = 0
        self._words[base + 3] = at << 32 | len(blob)
        self._words[base + 4] = at + parts.tokens_at << 32 | len(prompt)
        self._words[base + 5] = at + parts.output_at << 32 | sampling.max_tokens
        self._words[base + 6] = at + parts.logprobs_at << 32 | parts.record
        self._words[base + 7] = 0
        self._words[base + 9] = params.priority & _U64
        self._words[base + 10] = 0
        self._words[base + 11] = 0
        self._words[base + 12] = 0
        self._words[base + 14] = at + parts.prompt_logprobs_at << 32 | parts.prompt_record
        self._words[base + 15] = 0
        self._words[base + 1] = _NO_OWNER << 16 | SlotState.LIVE
        return slot

    def assign(self, slot: int, epoch: int, engine: int, incarnation: int, weights: int = 0) -> None:
        """Make an engine, which has these weights, the owner at `epoch`.

        One aligned store commits both, and what was written before: incarnation and weights.
        """
        base = slot * SLOT_WORDS
        which = self._words[base + 1] & _WHICH ^ _WHICH
        self._words[base + (8 if which else 7)] = incarnation
        self._words[base + (13 if which else 12)] = weights
        self._words[base + 1] = epoch << 32 | engine << 16 | which | SlotState.LIVE

    def reprioritise(self, slot: int, priority: int) -> None:
        """Change the priority of the request with one store."""
        self._words[slot * SLOT_WORDS + 9] = priority & _U64

    def record_cached(self, slot: int, num_cached_tokens: int) -> None:
        """Record how many prompt tokens came from the prefix cache."""
        self._words[slot * SLOT_WORDS + 10] = num_cached_tokens << 32

    def record_crashes(self, slot: int, crashes: Crashes) -> None:
        """Record the crashes that the request has been through, with one store."""
        self._words[slot * SLOT_WORDS + 11] = crashes.epoch << 32 | crashes.failed << 16 | crashes.crashed

    def append(self, slot: int, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs | None] | None) -> None:
        """Append accepted output tokens: write them, then commit their number with one store.

        Raises ValueError if they exceed the reservation.
        """
        n = self.num_output(slot)
        offset, capacity = self._pair(slot, 5)
        if n + len(tokens) > capacity:
            raise ValueError(f"request {self.rid(slot)} exceeds its reservation of {capacity} tokens")
        base = offset // 4 + n
        for i, token in enumerate(tokens):
            self._u32[base + i] = token
        if logprobs is not None:
            self._write_logprobs(slot, n, logprobs)
        self._words[slot * SLOT_WORDS + 2] = n + len(tokens)

    def append_prompt_logprobs(self, slot: int, new: PromptLogprobs) -> None:
        """Append the records that are not accepted yet: write them, then commit their number with one store.

        Raises ValueError if records before them are missing, or if they exceed the prompt.
        """
        n = self.num_prompt_logprobs(slot)
        offset, record = self._pair(slot, 14)
        end = new.start + len(new.records) // record if record else 0
        if new.start > n or end >= self.prompt_len(slot):
            raise ValueError(f"request {self.rid(slot)} has {n} logprobs of its prompt, not {new.start}")
        if end > n:
            self._view[offset + n * record : offset + end * record] = new.records[(n - new.start) * record :]
            self._words[slot * SLOT_WORDS + 15] = end

    def end(self, slot: int, finish: Finish, failure: Failure = Failure.NONE) -> None:
        """End the request, whose output is complete. Its slot and its space stay until `close`."""
        base = slot * SLOT_WORDS
        self._words[base + 10] = self.num_cached_tokens(slot) << 32 | failure << 16 | finish
        self._words[base + 1] = self._words[base + 1] & ~0xFF | SlotState.ENDED

    def close(self, slot: int) -> None:
        """Free the slot and the space of a request: it has ended, and its output is delivered."""
        base = slot * SLOT_WORDS
        self._words[base + 1] = self._words[base + 1] & ~0xFF | SlotState.CLOSED
        self._arena.free(*self._reserved.pop(slot))
        self._words[base + 1] = SlotState.FREE
        self._free_slots.append(slot)

    @property
    def free_bytes(self) -> int:
        return self._arena.free_bytes

    def reserved_bytes(self, slot: int) -> int:
        """Return how much of `free_bytes` the request in the slot has taken."""
        return rounded(self._reserved[slot][1])

    def _reserve(self, size: int) -> tuple[int, int]:
        if size > self._capacity:
            raise JournalTooSmall(f"the request needs {size} bytes of journal, journal_memory has {self._capacity}")
        start = self._arena.allocate(size) if self._free_slots else None
        if start is None:
            raise JournalFull("the journal has no room for another request")
        slot = self._free_slots.pop()
        self._reserved[slot] = (start, size)
        return slot, start

    def _write_logprobs(self, slot: int, position: int, logprobs: Sequence[TokenLogprobs | None]) -> None:
        offset, record = self._pair(slot, 6)
        if not record:
            return
        for i, entry in enumerate(logprobs):
            at = offset + (position + i) * record
            self._view[at : at + record] = _pack_logprobs(entry, record)


def _pack_logprobs(entry: TokenLogprobs | None, record: int) -> bytes:
    if entry is None:
        entry = TokenLogprobs(float("nan"), [], [])
    packed = struct.pack("<f", entry.logprob)
    for token, logprob in zip(entry.top_ids, entry.top_logprobs, strict=True):
        packed += struct.pack("<If", token, logprob)
    unused = (record - len(packed)) // 8
    return packed + struct.pack("<If", _NO_TOKEN, 0.0) * unused


def _unpack_logprobs(record: memoryview) -> TokenLogprobs | None:
    (chosen,) = struct.unpack_from("<f", record)
    if isnan(chosen):  # `_pack_logprobs` had none
        return None
    top = [t for t in struct.iter_unpack("<If", record[4:]) if t[0] != _NO_TOKEN]
    return TokenLogprobs(chosen, [t[0] for t in top], [t[1] for t in top])
