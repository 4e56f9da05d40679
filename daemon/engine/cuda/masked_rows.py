"""Rows that are sampled under a mask: once more, on the device, when their masks are there.

The step samples them without a mask first, as it does all rows: a graph always does the same work. Then their logits
are copied, those of forbidden tokens become -inf, and the same sampler samples again with the same noise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from daemon.engine.cuda.sampler import DeviceSampler, SamplingTensors
from daemon.engine.cuda.staging import host_memory
from daemon.engine.request import Request
from daemon.engine.runner import NO_TOKEN, TokenMasks

_CHUNK = 1 << 22  # logits that are sampled at a time: some ten MB


class MaskedCount(NamedTuple):
    """Number of masked rows of a step; so many of them, the first ones, are decodes."""

    rows: int
    decodes: int


class StagedMasks:
    """The masks of one step on the host, one row of bits for each masked row, and the rows."""

    def __init__(self, max_rows: int, vocab_size: int, *, pinned: bool) -> None:
        words = -(-vocab_size // 32)
        self.bits = host_memory(4 * max_rows * words, pinned=pinned).view(torch.int32).view(max_rows, words)
        self.rows = host_memory(8 * max_rows, pinned=pinned).view(torch.int64)
        self._bits = self.bits.numpy()
        self._rows = self.rows.numpy()

    def fill(self, requests: list[Request], rows: list[int], masks: TokenMasks | None) -> dict[int, int]:
        """Store the masks of `requests`, whose logits are in `rows`. Wait for masks that are late only a little.

        Return what stands for the token of each row without a mask. Such a row is sampled as if every token were
        allowed, and its token is of no use.
        """
        missing: dict[int, int] = {}
        for i, (request, row) in enumerate(zip(requests, rows, strict=True)):
            mask = NO_TOKEN if masks is None else masks.of(request)
            if isinstance(mask, int):
                missing[row] = mask
                self._bits[i] = -1
            else:
                self._bits[i] = mask
        self._rows[: len(rows)] = rows
        return missing


class MaskedRows:
    """Samples masked rows over the logits and tokens of a step. Call it only from work in the stream."""

    def __init__(self, sampler: DeviceSampler, max_rows: int, vocab_size: int, device: torch.device) -> None:
        self._sampler = sampler
        words = -(-vocab_size // 32)
        self._at_once = min(max_rows, max(1, _CHUNK // vocab_size))
        self._words = torch.zeros(max_rows, words, 1, dtype=torch.int32, device=device)
        self._rows = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._drawn = torch.zeros(self._at_once, dtype=torch.int32, device=device)
        self._shifts = torch.arange(32, dtype=torch.int32, device=device)
        # All memory is taken here: a step must not run out of it.
        self._logits = torch.zeros(self._at_once, vocab_size, dtype=torch.float32, device=device)
        self._bits = torch.zeros(self._at_once, words, 32, dtype=torch.int32, device=device)
        self._forbidden = torch.zeros(self._at_once, words * 32, dtype=torch.bool, device=device)

    def copy(self, staged: StagedMasks, count: int) -> None:
        """Copy the first `count` masks to the device."""
        self._words[:count, :, 0].copy_(staged.bits[:count], non_blocking=True)
        self._rows[:count].copy_(staged.rows[:count], non_blocking=True)

    def sample(
        self,
        logits: torch.Tensor,
        tokens: torch.Tensor,
        params: SamplingTensors,
        *,
        first: int,
        last: int,
        offset: int,
    ) -> None:
        """Sample the masked rows [first, last) from `logits` into `tokens`.

        `params` has an entry for each row of logits from `offset` on.
        """
        for begin in range(first, last, self._at_once):
            end = min(begin + self._at_once, last)
            rows = self._rows[begin:end]
            own = SamplingTensors(*(tensor.index_select(0, rows - offset) for tensor in params))
            drawn = self._sampler.sample(self._masked(logits, begin, end), own, out=self._drawn[: end - begin])
            tokens.index_copy_(0, rows, drawn)

    def _masked(self, logits: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """Return copies of the logits of rows [begin, end), with -inf for forbidden tokens."""
        count = end - begin
        copies, bits, forbidden = self._logits[:count], self._bits[:count], self._forbidden[:count]
        torch.index_select(logits, 0, self._rows[begin:end], out=copies)
        torch.bitwise_right_shift(self._words[begin:end], self._shifts, out=bits)
        bits &= 1
        torch.eq(bits.view(count, -1), 0, out=forbidden)
        return copies.masked_fill_(forbidden[:, : copies.shape[1]], -torch.inf)
