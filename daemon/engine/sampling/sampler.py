"""Sampler on the CPU: turns logits into tokens. A row's result does not depend on the other rows."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from daemon.engine.request import Request
from daemon.engine.runner import NO_TOKEN, StepResult, TokenMasks
from daemon.engine.sampling import filters, masks, noise, penalties
from daemon.ipc.messages import RequestParams, SamplingParams, TokenLogprobs

log = logging.getLogger(__name__)

MIN_TEMPERATURE = 1e-5
"""Below this a request is greedy, because logits / temperature could overflow float32."""

MIN_LOGPROB = -9999.0
"""Replaces every smaller logprob, also minus infinity, which JSON cannot represent."""

_SEED_MASK = (1 << 64) - 1


class _Scratch(NamedTuple):
    """Working memory of one thread."""

    keys: NDArray[np.uint64]  # [vocab]
    weights: NDArray[np.int64]  # [vocab]
    top_ids: NDArray[np.int64]  # [vocab]


class _Batch(NamedTuple):
    """The rows of one step, with an array for each sampling parameter."""

    logits: NDArray[np.float32]  # [rows, vocab]
    block_max: NDArray[np.float32]  # [rows, blocks]
    inverse_temperature: NDArray[np.float32]  # 0: greedy
    min_p_depth: NDArray[np.float32]  # temperature * log(min_p)
    top_k: NDArray[np.int64]
    top_p: NDArray[np.float64]
    seed: NDArray[np.uint64]
    position: NDArray[np.int64]
    floor: NDArray[np.float32]
    floor_id: NDArray[np.int64]
    tokens: NDArray[np.int64]  # the result
    requests: list[Request]
    failed: dict[int, int]  # what stands for the token of a row that gets none: NO_TOKEN or NOT_YET

    def fail(self, row: int) -> None:
        """Note that the work for this row alone has raised: it gets no token. Call it in the exception's handler."""
        log.exception("request %d ends with an error: its token cannot be sampled", self.requests[row].rid)
        self.failed[row] = NO_TOKEN


class _Rank(NamedTuple):
    """A row's raw distribution: the log of the sum of exp(logit), and the likeliest tokens."""

    log_total: float
    top_ids: list[int]


class Sampler:
    """Samples the next token of each row of logits.

    Order of work on a row: logprobs of the raw logits; bias, penalties and min_tokens (`penalties`); the mask of its
    grammar (`masks`); temperature, min-p, top-k and top-p (`filters`); sampling (`noise`). The token at a position
    depends only on the logits, the request's parameters and its tokens, bit for bit.

    NaN logits are never sampled and count as -inf; a +inf logit counts as the largest finite float. A row without a
    logit above -inf gives NO_TOKEN, and so does a row whose own work raises. Not thread-safe.
    """

    def __init__(self, vocab_size: int, threads: int = 1, eos_token_ids: tuple[int, ...] = ()) -> None:
        self._vocab_size = vocab_size
        self._blocks = -(-vocab_size // noise.BLOCK)
        self._penalties = penalties.Penalties(vocab_size, eos_token_ids)
        self._scratch = [_scratch(vocab_size) for _ in range(max(1, threads))]
        self._pool = ThreadPoolExecutor(threads - 1, "sampler") if threads > 1 else None

    def sample(
        self, logits: torch.Tensor, requests: list[Request], token_masks: TokenMasks | None = None
    ) -> StepResult:
        """Sample one token per row; row i of `logits` (float32[rows, vocab]) belongs to requests[i].

        The new token's position is ``len(request.tokens)``. Does not change `requests`. Contiguous float32 `logits`
        on the CPU are changed in place and restored before the return; others are copied first. Raises ValueError if
        the shapes do not match.
        """
        if logits.shape != (len(requests), self._vocab_size):
            raise ValueError(
                f"logits of shape {tuple(logits.shape)} for {len(requests)} requests "
                f"and a vocabulary of {self._vocab_size}"
            )
        if not requests:
            return StepResult([])
        values = logits.detach().to(device="cpu", dtype=torch.float32).contiguous().numpy()
        batch = self._batch(values, requests)
        self._parallel(batch, _find_maxima)
        ranks = [self._rank(batch, row, request) for row, request in enumerate(requests)]
        undo = [self._adjust(batch, row, request, token_masks) for row, request in enumerate(requests)]
        self._parallel(batch, _find_tokens)
        for row, changes in enumerate(undo):
            penalties.restore(values[row], changes)
        logprobs = None
        if any(rank is not None for rank in ranks):
            logprobs = [_logprobs(batch, row, rank) for row, rank in enumerate(ranks)]
        batch.tokens[list(batch.failed)] = list(batch.failed.values())
        return StepResult(batch.tokens.tolist(), logprobs)

    def warm_up(self) -> None:
        """Run every kernel once, so that no request waits while one is compiled or loaded."""
        sampling = SamplingParams(max_tokens=1, seed=0, top_k=1, top_p=0.5, repetition_penalty=2.0, logprobs=1)
        request = Request(rid=-1, epoch=0, frontend=0, params=RequestParams(sampling, 0.0), tokens=[0], prompt_len=1)
        self.sample(torch.zeros(1, self._vocab_size), [request])

    def _batch(self, values: NDArray[np.float32], requests: list[Request]) -> _Batch:
        params = [request.sampling for request in requests]
        rows = len(requests)
        return _Batch(
            logits=values,
            block_max=np.empty((rows, self._blocks), np.float32),
            inverse_temperature=np.array([inverse_temperature(p) for p in params], np.float32),
            min_p_depth=np.array([min_p_depth(p) for p in params], np.float32),
            top_k=np.array([p.top_k for p in params], np.int64),
            top_p=np.array([p.top_p for p in params], np.float64),
            seed=np.array([p.seed & _SEED_MASK for p in params], np.uint64),
            position=np.array([len(request.tokens) for request in requests], np.int64),
            floor=np.empty(rows, np.float32),
            floor_id=np.empty(rows, np.int64),
            tokens=np.empty(rows, np.int64),
            requests=requests,
            failed={},
        )

    def _parallel(self, batch: _Batch, work: Callable[[_Batch, int, int, _Scratch], None]) -> None:
        """Do `work` on all rows, divided between the threads."""
        rows, threads = len(batch.tokens), len(self._scratch)
        if self._pool is None or rows == 1:
            work(batch, 0, rows, self._scratch[0])
            return
        ends = [rows * i // threads for i in range(threads + 1)]
        others = [self._pool.submit(work, batch, ends[i], ends[i + 1], self._scratch[i]) for i in range(1, threads)]
        work(batch, 0, ends[1], self._scratch[0])
        for other in others:
            other.result()

    def _rank(self, batch: _Batch, row: int, request: Request) -> _Rank | None:
        num_logprobs = request.sampling.logprobs
        if num_logprobs < 0:
            return None
        keys, weights, top_ids = self._scratch[0]
        try:
            log_total, found = filters.rank_row(
                batch.logits, batch.block_max, row, min(num_logprobs, self._vocab_size), top_ids, keys, weights
            )
        except Exception:
            batch.fail(row)
            return None
        return _Rank(log_total, top_ids[: int(found)].tolist())

    def _adjust(self, batch: _Batch, row: int, request: Request, token_masks: TokenMasks | None) -> penalties.Undo:
        try:
            undo = self._penalties.apply(batch.logits[row], request)
        except Exception:
            batch.fail(row)
            return []
        if request.sampling.grammar:
            mask = NO_TOKEN if token_masks is None else token_masks.of(request)
            if isinstance(mask, int):
                batch.failed[row] = mask
            else:
                undo += masks.apply(batch.logits[row], mask)
        if undo:
            _find_maxima(batch, row, row + 1, self._scratch[0])
        return undo


def _scratch(vocab_size: int) -> _Scratch:
    return _Scratch(np.empty(vocab_size, np.uint64), np.empty(vocab_size, np.int64), np.empty(vocab_size, np.int64))


def inverse_temperature(params: SamplingParams) -> float:
    """Return 1 / temperature, not yet rounded to float32; GREEDY for temperatures below MIN_TEMPERATURE."""
    return 1.0 / params.temperature if params.temperature >= MIN_TEMPERATURE else float(noise.GREEDY)


def min_p_depth(params: SamplingParams) -> float:
    """Return temperature * log(min_p), not yet rounded to float32: the lowest logit of min-p, minus the largest."""
    return params.temperature * math.log(min(params.min_p, 1.0)) if params.min_p > 0.0 else -math.inf


def _find_maxima(batch: _Batch, start: int, stop: int, _: _Scratch) -> None:
    filters.find_maxima(batch.logits.view(np.int32), start, stop, batch.block_max.view(np.int32))


def _find_tokens(batch: _Batch, start: int, stop: int, scratch: _Scratch) -> None:
    filters.find_cutoffs(
        batch.logits,
        batch.block_max,
        start,
        stop,
        batch.inverse_temperature,
        batch.min_p_depth,
        batch.top_k,
        batch.top_p,
        batch.floor,
        batch.floor_id,
        scratch.keys,
        scratch.weights,
    )
    noise.sample_rows(
        batch.logits,
        batch.block_max,
        start,
        stop,
        batch.floor,
        batch.floor_id,
        batch.inverse_temperature,
        batch.seed,
        batch.position,
        batch.tokens,
    )


def _logprobs(batch: _Batch, row: int, rank: _Rank | None) -> TokenLogprobs | None:
    """Return the logprobs of a row, from its raw logits."""
    if rank is None:
        return None
    logits, token = batch.logits[row], int(batch.tokens[row])
    try:
        tops = [_logprob(logits, top, rank) for top in rank.top_ids]
        return TokenLogprobs(_logprob(logits, token, rank), rank.top_ids, tops)
    except Exception:
        batch.fail(row)
        return None


def _logprob(logits: NDArray[np.float32], token: int, rank: _Rank) -> float:
    """Return the logprob of `token`, rounded to float32: a journal holds it without a further loss."""
    logprob = min(float(logits[token]), float(np.finfo(np.float32).max)) - rank.log_total
    return float(np.float32(max(MIN_LOGPROB, min(logprob, 0.0)))) if math.isfinite(logprob) else MIN_LOGPROB
