"""How far a frontend may have come when it dies: what it has handled, and what it has not sent yet. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from tests.protocol.engine_model import FRONTEND, Record

Rings = Mapping[tuple[int, int], list[Record]]


def handled(rings: Rings) -> Iterator[tuple[int, int, bool]]:
    """Return the records that the frontend may have handled and not acknowledged: (engine, count, half).

    They are the first one or two of one ring to it. `half`: of the last one only the output is journaled.
    """
    yield 0, 0, False
    for (a, b), ring in rings.items():
        if b == FRONTEND:
            yield from ((a, count, half) for count in range(1, min(len(ring), 2) + 1) for half in (False, True))


def lost(rings: Rings, engines: int) -> Iterator[tuple[int, ...]]:
    """Return how many of the last commands to each engine may be lost: those that waited for room in a ring.

    Any number of them to one engine, or all of them to all engines. So also every order is lost that the frontend
    was about to send after its last store to the journal.
    """
    waiting = [len(rings[FRONTEND, index]) for index in range(engines)]
    nothing = (0,) * engines
    yield nothing
    for i, most in enumerate(waiting):
        yield from ((*nothing[:i], count, *nothing[i + 1 :]) for count in range(1, most + 1))
    if sum(map(bool, waiting)) > 1:
        yield tuple(waiting)
