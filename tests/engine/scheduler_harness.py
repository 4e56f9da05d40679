"""A scheduler without a runner: each sampling row gets the same token."""

from __future__ import annotations

from collections.abc import Iterable

from daemon.engine.request import Request
from daemon.engine.runner import StepResult
from daemon.engine.scheduler import Emission, Scheduler
from daemon.ipc.messages import RequestParams, SamplingParams
from daemon.kvpool.block_manager import BlockManager

SIZE, EOS = 4, 2  # block size in tokens; end-of-sequence token


def make_scheduler(blocks: int = 100, seqs: int = 8, tokens: int = 64, max_len: int = 1000, **options) -> Scheduler:
    """Return a scheduler over a pool of `blocks` usable blocks."""
    return Scheduler(
        BlockManager(blocks + 1, SIZE),
        max_num_seqs=seqs,
        max_batch_tokens=tokens,
        max_model_len=max_len,
        eos_token_ids=(EOS,),
        **options,
    )


def make_request(
    rid: int,
    prompt: int | Iterable[int] = 4,
    *,
    priority: int = 0,
    arrival: float | None = None,
    epoch: int = 1,
    frontend: int = 0,
    output: Iterable[int] = (),
    **sampling,
) -> Request:
    """`prompt`: its length, in which case no two requests share a prefix; or its tokens."""
    tokens = [1000 + rid] * prompt if isinstance(prompt, int) else list(prompt)
    params = RequestParams(
        SamplingParams(**{"max_tokens": 100, "seed": 0} | sampling), rid if arrival is None else arrival, priority
    )
    return Request(rid, epoch, frontend, params, [*tokens, *output], len(tokens))


def add(scheduler: Scheduler, *requests: Request) -> None:
    """Queue the requests."""
    for request in requests:
        assert scheduler.add(request)


def run_step(
    scheduler: Scheduler, token: int = 9, now: float = 0.0
) -> tuple[list[tuple[int, int, int]], list[int], list[Emission]]:
    """Run one step in which every row samples `token`.

    Return the rows as (rid, start, count), the rids of the preempted requests, and the emissions.
    """
    plan = scheduler.plan(now)
    assert plan is not None
    sampled = [token for row in plan.rows if row.sample]
    emissions = scheduler.apply_result(plan, StepResult(sampled), now)
    scheduler.check()
    return [(r.request.rid, r.start, r.count) for r in plan.rows], [r.rid for r in plan.preempted], emissions


def rids(scheduler: Scheduler) -> tuple[list[int], list[int]]:
    """Return the rids of the running requests, sorted, and those of the waiting ones, in order."""
    return sorted(scheduler.running), [r.rid for r in scheduler.waiting]
