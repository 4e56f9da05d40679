"""Which engine gets a new request: the freest, from the boards alone. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from daemon.control.load import NOTHING, InFlight, freeness
from daemon.control.messages import Demand, EngineFacts, EngineState, FrontendFacts

_NO_DEMAND = Demand(0, 0, 0)


def choose(engines: Sequence[EngineFacts | None], in_flight: Sequence[InFlight], turn: int) -> int | None:
    """Index of the serving engine with the highest freeness, or None. `turn` rotates ties between calls."""
    best, best_freeness = None, 0.0
    n = len(engines)
    for step in range(n):
        i = (turn + step) % n
        facts = engines[i]
        if facts is None or facts.state != EngineState.SERVING:
            continue
        free = freeness(facts, in_flight[i])
        if best is None or free > best_freeness:
            best, best_freeness = i, free
    return best


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
