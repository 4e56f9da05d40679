"""Finds the requests because of which a step raised: each row is computed once more in a step of its own.

A row that raises again ends its request; the others get their tokens. A step may be computed twice, because KV and
tokens are functions of the request alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from daemon.engine.request import Request
from daemon.engine.runner import NO_TOKEN, Row, Runner, StepPlan, StepResult
from daemon.ipc.messages import RequestParams, SamplingParams, TokenLogprobs

log = logging.getLogger(__name__)


def compute_row_by_row(
    runner: Runner, plan: StepPlan, error: Exception, beat: Callable[[], None] = lambda: None
) -> StepResult:
    """Compute a step that has raised `error`, each row alone. No other step may be in flight.

    `beat` is called before each row, because a row alone may take as long as the whole step.

    The rows that raise again are dropped. Raises `error` if a dummy row raises, too: then the runner is broken, and
    no request is to blame.
    """
    log.warning("a step of %d rows raised %r; each row is computed alone", len(plan.rows), error)
    tokens: list[int] = []
    logprobs: list[TokenLogprobs | None] = []
    dropped: list[int] = []
    scored: dict[int, bytes] = {}
    for i, row in enumerate(plan.rows):
        beat()
        result = _compute(runner, row, plan, decode=i < plan.num_decodes)
        if result is None or result.dropped:
            dropped.append(i)
        elif result.prompt_logprobs:
            scored[i] = result.prompt_logprobs[0]
        if row.sample:
            tokens.append(NO_TOKEN if result is None or result.dropped else result.tokens[0])
            logprobs.append(result.logprobs[0] if result is not None and result.logprobs else None)
    if dropped:
        beat()
        _check(runner, error)
    return StepResult(tokens, logprobs if any(logprobs) else None, tuple(dropped), scored)


def _compute(runner: Runner, row: Row, plan: StepPlan, *, decode: bool) -> StepResult | None:
    """Compute one row of `plan`. Return None if it raises, or if its request has left the batch since the plan."""
    request = row.request
    if request.finish or request.preemptions != row.preemptions:
        return None
    try:
        return runner.execute(StepPlan([row], int(decode), masks=plan.masks))
    except Exception:
        log.exception("request %d ends with an error: its step raised", request.rid)
        return None


def _check(runner: Runner, error: Exception) -> None:
    """Raise `error` if the runner cannot compute a row in the dummy block, either."""
    params = RequestParams(SamplingParams(max_tokens=1, seed=0), arrival=0.0)
    request = Request(rid=-1, epoch=0, frontend=0, params=params, tokens=[0], prompt_len=1, block_table=[0])
    try:
        runner.execute(StepPlan([Row(request, 0, 1, True)], 0))
    except Exception as e:
        log.critical("a step of a dummy row raises, too: %r", e)
        raise error from e
