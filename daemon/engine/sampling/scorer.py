"""The logprobs of a prompt's tokens, from logits on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from daemon.engine import prompt_scores
from daemon.engine.prompt_scores import Scores
from daemon.engine.runner import Row
from daemon.engine.sampling import filters, noise
from daemon.engine.sampling.sampler import MIN_LOGPROB
from daemon.ipc.prompt_logprobs import NO_ID

_MAX_FLOAT = np.float32(np.finfo(np.float32).max)


class Scorer:
    """Scores the prompts of steps by the raw logits, as `Sampler` does the tokens of the output. Not thread-safe."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._keys = np.empty(vocab_size, np.uint64)
        self._weights = np.empty(vocab_size, np.int64)
        self._top_ids = np.empty(vocab_size, np.int64)

    def step(self, rows: Sequence[Row]) -> StepScorer:
        """Return what scores one step with these rows."""
        return StepScorer(self, rows)

    def score(self, logits: NDArray[np.float32], targets: NDArray[np.int64], top: int) -> Scores:
        """Score `targets` (int64[rows]) by `logits` (float32[rows, vocab], contiguous), with `top` alternatives.

        A token outside the vocabulary has the lowest logprob.
        """
        rows = len(logits)
        block_max = np.empty((rows, -(-self._vocab_size // noise.BLOCK)), np.float32)
        filters.find_maxima(logits.view(np.int32), 0, rows, block_max.view(np.int32))
        totals = np.empty((rows, 1))
        ids = np.full((rows, top), NO_ID, np.int64)
        for row in range(rows):
            totals[row], found = filters.rank_row(
                logits, block_max, row, min(top, self._vocab_size), self._top_ids, self._keys, self._weights
            )
            ids[row, : int(found)] = self._top_ids[: int(found)]
        known = np.clip(targets, 0, self._vocab_size - 1)[:, None]
        chosen = np.where(known == targets[:, None], np.take_along_axis(logits, known, 1), np.float32(-np.inf))
        ranks = np.maximum(1, np.count_nonzero(logits >= chosen, axis=1))
        tops = np.take_along_axis(logits, np.minimum(ids, self._vocab_size - 1), 1)
        return Scores(
            _logprobs(chosen, totals)[:, 0], ranks.astype(np.uint32), ids.astype(np.uint32), _logprobs(tops, totals)
        )


class StepScorer:
    """Scores one step, some of its positions at a time."""

    def __init__(self, scorer: Scorer, rows: Sequence[Row]) -> None:
        self._scorer = scorer
        self._rows = rows
        self._targets = prompt_scores.targets(rows)
        self._top = prompt_scores.num_alternatives(rows)
        self._parts: list[Scores] = []

    def add(self, first: int, logits: torch.Tensor) -> None:
        """Score the positions from index `first` on. `logits`: float32[positions, vocab] on the CPU."""
        targets = self._targets[first : first + len(logits)]
        self._parts.append(self._scorer.score(logits.contiguous().numpy(), targets, self._top))

    def records(self) -> dict[int, bytes] | None:
        """Return the records of the step, see `StepResult`; None if no position was scored."""
        if not self._parts:
            return None
        scores = Scores(*(np.concatenate(arrays) for arrays in zip(*self._parts, strict=True)))
        return prompt_scores.records(self._rows, scores)


def _logprobs(logits: NDArray[np.float32], totals: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return logprobs in [MIN_LOGPROB, 0]. `totals`: of each row, the log of the sum of exp(logit)."""
    with np.errstate(invalid="ignore"):
        values = np.minimum(logits, _MAX_FLOAT) - totals
    return np.clip(np.where(np.isfinite(values), values, MIN_LOGPROB), MIN_LOGPROB, 0.0).astype(np.float32)
