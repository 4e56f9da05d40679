"""Dispatch: the engine for a new request is the freest, by the boards alone (Llumnix, section 4.4.3). Pure."""

from __future__ import annotations

from collections.abc import Sequence

from daemon.control.policy.freeness import LLUMD, NONE_IN_FLIGHT, SERVING, InFlight, Policy
from daemon.ipc.messages import Demand, EngineFacts, FrontendFacts

_NO_DEMAND = Demand(0, 0, 0)

REQUEST_COST = 64  # tokens of prefill that weigh as much as one more request in the batch
AFFINITY_BOUND = 4  # requests by which a cached prefix may outweigh a lighter load, however long the prefix is


def choose(
    engines: Sequence[EngineFacts | None],
    in_flight: Sequence[InFlight],
    turn: int,
    *,
    policy: Policy = LLUMD,
    high: bool = False,
    matched: Sequence[int] | None = None,
) -> int | None:
    """Return the index of the serving engine with the highest freeness, or None if no engine serves.

    `turn` rotates ties between calls. `high`: the request is of high priority. `matched`: the number of leading
    blocks of its prompt that each engine is assumed to have cached; it decides ties and small differences, see
    `_choose_by_prefix`.
    """
    best, best_freeness = None, 0.0
    freeness_of = policy.dispatch
    n = len(engines)
    for step in range(n):
        i = (turn + step) % n
        facts = engines[i]
        if facts is None or facts.state != SERVING:
            continue
        freeness = freeness_of(facts, in_flight[i], high)
        if best is None or freeness > best_freeness:
            best, best_freeness = i, freeness
    if best is None or matched is None or max(matched) <= matched[best]:
        return best
    return _choose_by_prefix(engines, in_flight, best, best_freeness, matched, policy, high)


def _choose_by_prefix(
    engines: Sequence[EngineFacts | None],
    in_flight: Sequence[InFlight],
    best: int,
    best_freeness: float,
    matched: Sequence[int],
    policy: Policy,
    high: bool,
) -> int:
    """Return the engine with the best net gain over the freest, `best`: prefill saved minus extra queued work.

    Candidates are engines that are as free as `best` or have room to spare (`migrate_high`). No match is worth more
    than AFFINITY_BOUND requests: a common prefix never piles up requests on one engine.
    """
    freest = engines[best]
    assert freest is not None
    best_work = _queued_work(freest, in_flight[best])
    chosen, chosen_gain = best, 0
    for i, facts in enumerate(engines):
        if facts is None or facts.state != SERVING or matched[i] <= matched[best]:
            continue
        saved = min((matched[i] - matched[best]) * facts.block_size, AFFINITY_BOUND * REQUEST_COST)
        gain = saved - max(0, _queued_work(facts, in_flight[i]) - best_work)
        if gain > chosen_gain:
            freeness = policy.dispatch(facts, in_flight[i], high)
            if freeness >= best_freeness or freeness >= policy.thresholds.migrate_high:
                chosen, chosen_gain = i, gain
    return chosen


def _queued_work(facts: EngineFacts, in_flight: InFlight) -> int:
    """Return the work ahead of a new request, in tokens of prefill."""
    batch = facts.running + facts.waiting + facts.incoming + in_flight.requests
    return batch * REQUEST_COST + facts.pending_prefill_tokens + in_flight.tokens


def count_in_flight(
    engines: Sequence[EngineFacts | None], frontends: Sequence[FrontendFacts | None]
) -> list[InFlight]:
    """Return, for each engine, what all frontends have sent to it and its facts do not count yet.

    Totals are comparable only between matching incarnations: a frontend counts since the engine's incarnation
    began, an engine since the frontend's incarnation began.
    """
    in_flight = [NONE_IN_FLIGHT] * len(engines)
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
                before = in_flight[i]
                in_flight[i] = InFlight(
                    before.requests + sent.requests - taken.requests, before.tokens + sent.tokens - taken.tokens
                )
    return in_flight
