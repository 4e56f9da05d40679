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


def in_flight(
    engine: int,
    facts: EngineFacts,
    frontends: Sequence[FrontendFacts | None],
) -> InFlight:
    """What all frontends have sent to `engine` and its facts do not count yet.

    Totals are comparable only between matching incarnations: the frontend counts since the engine was born,
    the engine since the frontend was.
    """
    requests = tokens = 0
    for k, frontend in enumerate(frontends):
        if frontend is None or engine >= len(frontend.submitted):
            continue
        sent = frontend.submitted[engine]
        if sent.peer != facts.incarnation:
            continue
        taken = facts.consumed[k] if k < len(facts.consumed) else None
        if taken is None or taken.peer != frontend.incarnation:
            taken = _NO_DEMAND
        requests += max(0, sent.requests - taken.requests)
        tokens += max(0, sent.tokens - taken.tokens)
    return InFlight(requests, tokens) if requests else NOTHING
