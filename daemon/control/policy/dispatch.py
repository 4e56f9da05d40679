"""Which engine gets a new request: the freest, from the boards alone (Llumnix, section 4.4.3). Pure."""

from __future__ import annotations

from collections.abc import Sequence

from daemon.control.policy.freeness import LLUMD, NOTHING, SERVING, InFlight, Policy
from daemon.ipc.messages import Demand, EngineFacts, FrontendFacts

_NO_DEMAND = Demand(0, 0, 0)

REQUEST_WORTH = 64  # tokens of prefill that weigh as much as one more request in the batch
AFFINITY_BOUND = 4  # requests by which a cached prefix may outweigh a lighter load, however long it is


def choose(
    engines: Sequence[EngineFacts | None],
    in_flight: Sequence[InFlight],
    turn: int,
    *,
    policy: Policy = LLUMD,
    high: bool = False,
    matched: Sequence[int] | None = None,
) -> int | None:
    """Index of the serving engine with the highest freeness, or None. `turn` rotates ties between calls.

    `high`: the request is of high priority. `matched`: leading blocks of its prompt that each engine is thought
    to hold; they break ties and small differences, see `_nearest`.
    """
    best, best_freeness = None, 0.0
    judge = policy.dispatch
    n = len(engines)
    for step in range(n):
        i = (turn + step) % n
        facts = engines[i]
        if facts is None or facts.state != SERVING:
            continue
        free = judge(facts, in_flight[i], high)
        if best is None or free > best_freeness:
            best, best_freeness = i, free
    if best is None or matched is None or max(matched) <= matched[best]:
        return best
    return _nearest(engines, in_flight, best, best_freeness, matched, policy, high)


def _nearest(
    engines: Sequence[EngineFacts | None],
    in_flight: Sequence[InFlight],
    best: int,
    best_freeness: float,
    matched: Sequence[int],
    policy: Policy,
    high: bool,
) -> int:
    """The engine that saves the most prefill for what more work it has than the freest, `best`.

    Only an engine that is as free as the best, or has room to spare (`migrate_high`), comes into question, and
    no match is worth more than AFFINITY_BOUND requests: a common prefix never piles requests on one engine.
    """
    freest = engines[best]
    assert freest is not None
    least = _work(freest, in_flight[best])
    chosen, chosen_gain = best, 0
    for i, facts in enumerate(engines):
        if facts is None or facts.state != SERVING or matched[i] <= matched[best]:
            continue
        saved = min((matched[i] - matched[best]) * facts.block_size, AFFINITY_BOUND * REQUEST_WORTH)
        gain = saved - max(0, _work(facts, in_flight[i]) - least)
        if gain > chosen_gain:
            free = policy.dispatch(facts, in_flight[i], high)
            if free >= best_freeness or free >= policy.marks.migrate_high:
                chosen, chosen_gain = i, gain
    return chosen


def _work(facts: EngineFacts, in_flight: InFlight) -> int:
    """What is ahead of a new request, in tokens of prefill."""
    batch = facts.running + facts.waiting + facts.incoming + in_flight.requests
    return batch * REQUEST_WORTH + facts.pending_prefill_tokens + in_flight.tokens


def in_flight(engines: Sequence[EngineFacts | None], frontends: Sequence[FrontendFacts | None]) -> list[InFlight]:
    """What all frontends have sent to each engine and its facts do not count yet.

    Totals are comparable only between matching incarnations: a frontend counts since the engine was born,
    an engine since the frontend was.
    """
    flying = [NOTHING] * len(engines)
    for k, frontend in enumerate(frontends):
        if frontend is None:
            continue
        for i, (facts, sent) in enumerate(zip(engines, frontend.submitted, strict=True)):
            if facts is None or sent.peer != facts.incarnation:
                continue
            taken = facts.consumed[k]
            if taken.peer != frontend.incarnation:
                taken = _NO_DEMAND
            if sent.requests > taken.requests:
                before = flying[i]
                flying[i] = InFlight(
                    before.requests + sent.requests - taken.requests, before.tokens + sent.tokens - taken.tokens
                )
    return flying
