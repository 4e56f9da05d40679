"""The logprobs of a prompt's tokens as bytes: so engines send them, and so a journal keeps them.

The first token of a prompt has none. Record i is of prompt token i + 1: f32 logprob and u32 rank of the token, then
(u32 id, f32 logprob) for each alternative, the likeliest first; unused alternatives have id 2^32-1. All of one
request's records have the same size. A prompt may have a million tokens, so nothing here is an object per token until
an answer is written.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

NO_ID = 0xFFFFFFFF


class PromptLogprobs(NamedTuple):
    """Records from record `start` on."""

    start: int
    records: bytes


class PromptLogprob(NamedTuple):
    """One record. `rank`: 1 for the likeliest token of the vocabulary."""

    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]


def record_bytes(prompt_logprobs: int) -> int:
    """Return the size of a record, in bytes; 0 if there are none. The argument is as in `SamplingParams`."""
    return 0 if prompt_logprobs < 0 else 8 + 8 * prompt_logprobs


def unpack(records: bytes | memoryview, size: int) -> list[PromptLogprob]:
    """Return the records, of `size` bytes each."""
    found = []
    for logprob, rank, *pairs in struct.iter_unpack("<fI" + "If" * (size // 8 - 1), records):
        ids = [i for i in pairs[::2] if i != NO_ID]
        found.append(PromptLogprob(logprob, rank, ids, pairs[1 : 2 * len(ids) : 2]))
    return found
