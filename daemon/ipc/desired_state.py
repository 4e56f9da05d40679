"""Wish words: the state that the coordinator wants each engine in, one u64 an engine in shared memory.

Not messages but levels: a wish outlives the engine it is meant for and the coordinator who wrote it. So an engine
that dies while it drains comes back draining, and a new coordinator goes on where the last one stopped.
"""

from __future__ import annotations

from collections.abc import Sequence

from daemon.ipc.messages import EngineFacts, EngineState


class DesiredStateReader:
    """What is wished, by engine: SERVING (also where nothing was ever written), DRAINING or PARKED."""

    def __init__(self, words: memoryview) -> None:
        self._words = words.cast("Q")

    def of(self, engine: int) -> EngineState:
        return EngineState(self._words[engine] or EngineState.SERVING)


class DesiredStateWriter(DesiredStateReader):
    """The coordinator's hand on the words."""

    def put(self, engine: int, state: EngineState) -> None:
        """One aligned store. ValueError for a state that nobody can be wished in."""
        if state not in (EngineState.SERVING, EngineState.DRAINING, EngineState.PARKED):
            raise ValueError(f"an engine cannot be wished {state.name.lower()}")
        self._words[engine] = state


def served_without(engine: int, facts: Sequence[EngineFacts | None], desired_states: DesiredStateReader) -> bool:
    """Whether an engine other than `engine` serves and is to go on serving."""
    return any(
        f is not None and f.state == EngineState.SERVING and desired_states.of(i) == EngineState.SERVING
        for i, f in enumerate(facts)
        if i != engine
    )
