"""Which tokens of a request its next row of a step computes. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from daemon.engine.request import Request
from daemon.engine.runner import NOT_SCORED, Row


def split_decodes(requests: Iterable[Request]) -> tuple[list[Request], list[Request]]:
    """Split into decoding requests, with one token to compute, and half-prefilled requests, with more."""
    decoding: list[Request] = []
    prefilling: list[Request] = []
    for request in requests:
        (decoding if request.pending == 1 else prefilling).append(request)
    return decoding, prefilling


def next_row(request: Request, count: int) -> Row:
    """Return a row for the next `count` tokens of the request."""
    start = request.num_computed + request.num_inflight_tokens
    scored = _scored(request, start, count) if request.unscored else NOT_SCORED
    return Row(request, start, count, count == request.pending, request.preemptions, scored)


def _scored(request: Request, start: int, count: int) -> range:
    """Return the positions of a row whose logits give logprobs of the prompt that are not applied yet.

    The rows in flight end where this one starts, so none of them has these positions.
    """
    first = max(start, request.num_scored)
    return range(first, max(first, min(start + count, request.prompt_len - 1)))
