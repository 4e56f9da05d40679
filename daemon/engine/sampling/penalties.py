"""What a request does to its own logits: bias, penalties on repeated tokens, no end before `min_tokens`.

In this order, on raw logits, as vLLM has it: logit bias adds; the repetition penalty divides positive and multiplies
other logits of tokens in prompt or output; frequency and presence penalties subtract, for tokens of the output
alone; the end-of-sequence and stop tokens of a request shorter than `min_tokens` become -inf.
All of it touches only few logits, and everything it needs is a fold over the request's tokens: the counts kept here
save time, they hold nothing that could be lost.
"""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from daemon.engine.jit import kernel
from daemon.engine.request import Request
from daemon.ipc.messages import SamplingParams

Undo = list[tuple[NDArray[np.int64], NDArray[np.float32]]]
"""(ids, logits they had), in the order in which they were changed."""


@kernel("void(float32[::1], int64[::1], int32[::1], float32, float32, float32)")
def penalise(
    logits: np.ndarray, ids: np.ndarray, counts: np.ndarray, repetition: float, frequency: float, presence: float
) -> None:
    """Apply the three penalties to `logits` (float32[vocab]) of `ids` (int64[n]), `counts` (int32[n]) times in
    the output; an id with count 0 stands in the prompt alone."""
    for i in range(len(ids)):
        logit = logits[ids[i]]
        logit = logit / repetition if logit > 0 else logit * repetition
        if counts[i] > 0:
            logit -= frequency * np.float32(counts[i])
            logit -= presence
        logits[ids[i]] = logit


class _Counts:
    """Distinct tokens of one request and how often its output has each."""

    def __init__(self, request: Request, vocab_size: int) -> None:
        self.epoch = request.epoch
        self.tokens = request.tokens
        self._vocab_size = vocab_size
        # Only the repetition penalty looks at the prompt.
        prompt = request.tokens[: request.prompt_len] if request.sampling.repetition_penalty != 1.0 else []
        known = [t for t in dict.fromkeys(prompt) if 0 <= t < vocab_size]
        self._slots = {t: slot for slot, t in enumerate(known)}
        self._folded = request.prompt_len
        self._ids = np.zeros(max(64, 2 * len(known)), np.int64)
        self._ids[: len(known)] = known
        self._counts = np.zeros(len(self._ids), np.int32)

    def is_of(self, request: Request) -> bool:
        """`request` still is what this was counted from, perhaps with more output."""
        return self.epoch == request.epoch and self.tokens is request.tokens and self._folded <= len(request.tokens)

    def update(self) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Count the tokens that are new. Returns (ids, times in the output)."""
        for token in self.tokens[self._folded :]:
            if 0 <= token < self._vocab_size:
                slot = self._slot(token)  # first: it may replace the arrays by larger ones
                self._counts[slot] += 1
        self._folded = len(self.tokens)
        n = len(self._slots)
        return self._ids[:n], self._counts[:n]

    def _slot(self, token: int) -> int:
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[slot] = token
        return slot


class _Fixed(NamedTuple):
    """What the parameters alone decide."""

    sampling: SamplingParams
    bias_ids: NDArray[np.int64]
    bias: NDArray[np.float32]
    end_ids: NDArray[np.int64]


class Penalties:
    """The adjustments of all requests of one engine. Ids outside the vocabulary are ignored.

    What is remembered of a request goes with the request.
    """

    def __init__(self, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._counts: WeakKeyDictionary[Request, _Counts] = WeakKeyDictionary()
        self._fixed: WeakKeyDictionary[Request, _Fixed] = WeakKeyDictionary()

    def apply(self, logits: NDArray[np.float32], request: Request) -> Undo:
        """Adjust one request's `logits` (float32[vocab]) in place; `restore` takes it back."""
        sampling = request.sampling
        undo: Undo = []
        if sampling.logit_bias:
            fixed = self._fixed_of(request)
            undo.append((fixed.bias_ids, logits[fixed.bias_ids]))
            logits[fixed.bias_ids] += fixed.bias
        if _penalises(sampling):
            ids, counts = self._counts_of(request).update()
            undo.append((ids, logits[ids]))
            penalise(
                logits,
                ids,
                counts,
                sampling.repetition_penalty,
                sampling.frequency_penalty,
                sampling.presence_penalty,
            )
        if request.num_output < sampling.min_tokens:
            fixed = self._fixed_of(request)
            undo.append((fixed.end_ids, logits[fixed.end_ids]))
            logits[fixed.end_ids] = -np.inf
        return undo

    def _counts_of(self, request: Request) -> _Counts:
        counts = self._counts.get(request)
        if counts is None or not counts.is_of(request):
            counts = self._counts[request] = _Counts(request, self._vocab_size)
        return counts

    def _fixed_of(self, request: Request) -> _Fixed:
        fixed = self._fixed.get(request)
        if fixed is None or fixed.sampling is not request.sampling:
            fixed = self._fixed[request] = self._fix(request.sampling)
        return fixed

    def _fix(self, sampling: SamplingParams) -> _Fixed:
        bias = {t: b for t, b in sampling.logit_bias if 0 <= t < self._vocab_size}
        ends = {t for t in (*self._eos_token_ids, *sampling.stop_token_ids) if 0 <= t < self._vocab_size}
        return _Fixed(
            sampling,
            np.array(list(bias), np.int64),
            np.array(list(bias.values()), np.float32),
            np.array(sorted(ends), np.int64),
        )


def restore(logits: NDArray[np.float32], undo: Undo) -> None:
    """Give `logits` the values they had before `Penalties.apply` returned `undo`."""
    for ids, values in reversed(undo):
        logits[ids] = values


def _penalises(sampling: SamplingParams) -> bool:
    return sampling.repetition_penalty != 1.0 or sampling.frequency_penalty != 0.0 or sampling.presence_penalty != 0.0
