"""Steps without requests of clients: to measure memory and time, and to warm up. Their KV is in the dummy block."""

from __future__ import annotations

from collections.abc import Sequence

from daemon.engine.request import Request
from daemon.engine.runner import Row, StepPlan
from daemon.ipc.messages import RequestParams, SamplingParams

_MOST = 20  # alternatives of a scored token, as many as a request may ask for


def dummy_step(*, decodes: Sequence[int] = (), chunks: Sequence[int] = ()) -> StepPlan:
    """Return a step of decodes of sequences, and of chunks, with so many tokens each."""
    rows = [Row(_request(count), count - 1, 1, True) for count in decodes]
    rows += [Row(_request(count), 0, count, True) for count in chunks]
    return StepPlan(rows, len(decodes))


def largest_step(*, rows: int, tokens: int, max_len: int, mixed: bool) -> StepPlan:
    """Return a step of chunks with `tokens` tokens in at most `rows` rows, none with more than `max_len`.

    Every token is scored. `mixed`: all other rows decode.
    """
    chunks: list[int] = []
    while tokens and len(chunks) < rows:
        chunks.append(min(tokens, max_len))
        tokens -= chunks[-1]
    step = dummy_step(decodes=[1] * (rows - len(chunks)) if mixed else [], chunks=chunks)
    step.rows[step.num_decodes :] = [
        row._replace(scored=range(row.count - 1)) for row in step.rows[step.num_decodes :]
    ]
    return step


def _request(length: int) -> Request:
    params = RequestParams(SamplingParams(max_tokens=1, seed=0, prompt_logprobs=_MOST), arrival=0.0)
    return Request(
        rid=0, epoch=0, frontend=0, params=params, tokens=[0] * length, prompt_len=length, block_table=[0] * length
    )
