"""Changes of a request's logits: logit bias, penalties for repeated tokens, and tokens that may not come.

They apply to the raw logits in this order, as in vLLM. The logit bias is added. The repetition penalty divides
positive logits and multiplies the others, for tokens of prompt and output. Frequency and presence penalties are
subtracted, for tokens of the output only. Then these become -inf: the end-of-sequence and stop tokens of a request
shorter than `min_tokens`; the token that would complete a bad word in the output; all tokens but the allowed ones.

They change only few logits, unless only some tokens are allowed, and depend only on the request's parameters and
tokens. The counts kept here are a cache: they can be computed again from the tokens.
"""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from daemon.engine.jit import kernel
from daemon.engine.request import Request
from daemon.ipc.messages import SamplingParams

Undo = list[tuple[NDArray[np.int64] | slice, NDArray[np.float32]]]
"""(ids, their previous logits), in the order of the changes."""

_ALL = slice(None)


@kernel("void(float32[::1], int64[::1], int32[::1], float32, float32, float32)")
def penalise(
    logits: np.ndarray, ids: np.ndarray, counts: np.ndarray, repetition: float, frequency: float, presence: float
) -> None:
    """Apply the three penalties to the `logits` (float32[vocab]) of `ids` (int64[n]).

    `counts` (int32[n]): how often each id is in the output; an id with count 0 is only in the prompt.
    """
    for i in range(len(ids)):
        logit = logits[ids[i]]
        logit = logit / repetition if logit > 0 else logit * repetition
        if counts[i] > 0:
            logit -= frequency * np.float32(counts[i])
            logit -= presence
        logits[ids[i]] = logit


class _Counts:
    """Distinct tokens of one request, and the number of times that each is in its output."""

    def __init__(self, request: Request, vocab_size: int) -> None:
        self.epoch = request.epoch
        self.tokens = request.tokens
        self._vocab_size = vocab_size
        # Only the repetition penalty uses the prompt.
        prompt = request.tokens[: request.prompt_len] if request.sampling.repetition_penalty != 1.0 else []
        known = [t for t in dict.fromkeys(prompt) if 0 <= t < vocab_size]
        self._slots = {t: slot for slot, t in enumerate(known)}
        self._num_counted = request.prompt_len
        self._ids = np.zeros(max(64, 2 * len(known)), np.int64)
        self._ids[: len(known)] = known
        self._counts = np.zeros(len(self._ids), np.int32)

    def is_of(self, request: Request) -> bool:
        """Return True if these are the counts of `request`, perhaps before its latest output."""
        same_tokens = self.epoch == request.epoch and self.tokens is request.tokens
        return same_tokens and self._num_counted <= len(request.tokens)

    def update(self) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Count the new tokens. Return (ids, number of times in the output)."""
        for token in self.tokens[self._num_counted :]:
            if 0 <= token < self._vocab_size:
                slot = self._slot(token)  # before the next line: it may replace the arrays by larger ones
                self._counts[slot] += 1
        self._num_counted = len(self.tokens)
        n = len(self._slots)
        return self._ids[:n], self._counts[:n]

    def _slot(self, token: int) -> int:
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[slot] = token
        return slot


class _ParamArrays(NamedTuple):
    """Arrays that depend only on the request's parameters."""

    sampling: SamplingParams
    bias_ids: NDArray[np.int64]
    bias: NDArray[np.float32]
    end_ids: NDArray[np.int64]
    allowed_ids: NDArray[np.int64]


class Penalties:
    """Applies bias, penalties and `min_tokens` for all requests of one engine. Ignores ids outside the vocabulary.

    The data cached for a request is deleted with the request.
    """

    def __init__(self, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._counts: WeakKeyDictionary[Request, _Counts] = WeakKeyDictionary()
        self._param_arrays: WeakKeyDictionary[Request, _ParamArrays] = WeakKeyDictionary()

    def apply(self, logits: NDArray[np.float32], request: Request) -> Undo:
        """Change one request's `logits` (float32[vocab]) in place. `restore` undoes it with the returned value."""
        sampling = request.sampling
        undo: Undo = []
        if sampling.logit_bias:
            arrays = self._param_arrays_of(request)
            undo.append((arrays.bias_ids, logits[arrays.bias_ids]))
            logits[arrays.bias_ids] += arrays.bias
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
            arrays = self._param_arrays_of(request)
            undo.append((arrays.end_ids, logits[arrays.end_ids]))
            logits[arrays.end_ids] = -np.inf
        if sampling.bad_words:
            ids = np.array(_completing(request, self._vocab_size), np.int64)
            undo.append((ids, logits[ids]))
            logits[ids] = -np.inf
        if sampling.allowed_token_ids:
            allowed = self._param_arrays_of(request).allowed_ids
            undo.append((_ALL, logits.copy()))
            kept = logits[allowed]
            logits.fill(-np.inf)
            logits[allowed] = kept
        return undo

    def _counts_of(self, request: Request) -> _Counts:
        counts = self._counts.get(request)
        if counts is None or not counts.is_of(request):
            counts = self._counts[request] = _Counts(request, self._vocab_size)
        return counts

    def _param_arrays_of(self, request: Request) -> _ParamArrays:
        arrays = self._param_arrays.get(request)
        if arrays is None or arrays.sampling is not request.sampling:
            arrays = self._param_arrays[request] = self._make_param_arrays(request.sampling)
        return arrays

    def _make_param_arrays(self, sampling: SamplingParams) -> _ParamArrays:
        bias = {t: b for t, b in sampling.logit_bias if 0 <= t < self._vocab_size}
        end_ids = {t for t in (*self._eos_token_ids, *sampling.stop_token_ids) if 0 <= t < self._vocab_size}
        return _ParamArrays(
            sampling,
            np.array(list(bias), np.int64),
            np.array(list(bias.values()), np.float32),
            np.array(sorted(end_ids), np.int64),
            np.array([t for t in sampling.allowed_token_ids if 0 <= t < self._vocab_size], np.int64),
        )


def restore(logits: NDArray[np.float32], undo: Undo) -> None:
    """Restore the values that `logits` had before the `Penalties.apply` that returned `undo`."""
    for ids, values in reversed(undo):
        logits[ids] = values


def _completing(request: Request, vocab_size: int) -> list[int]:
    """Return the tokens that would complete a bad word in the output. One word may be the end of another."""
    words, output = request.sampling.bad_words, request.num_output
    longest = min(output, max(map(len, words)) - 1)
    tail = request.tokens[len(request.tokens) - longest :]
    return sorted(
        {
            word[-1]
            for word in words
            if len(word) <= len(tail) + 1 and list(word[:-1]) == tail[len(tail) - len(word) + 1 :]
            if 0 <= word[-1] < vocab_size
        }
    )


def _penalises(sampling: SamplingParams) -> bool:
    return sampling.repetition_penalty != 1.0 or sampling.frequency_penalty != 0.0 or sampling.presence_penalty != 0.0
