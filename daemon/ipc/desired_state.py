"""Desired states: the state that the coordinator wants each engine to have, one u64 word per engine in shared memory.

A desired state is a level, not a message: it outlives its engine and the coordinator that wrote it. So an engine that
dies while it drains is draining again after its restart, and a new coordinator continues where its predecessor
stopped.
"""

from __future__ import annotations

from collections.abc import Sequence

from daemon.ipc.messages import EngineFacts, EngineState


class DesiredStateReader:
    """The desired state of each engine: SERVING (also if none was ever written), DRAINING or PARKED."""

    def __init__(self, words: memoryview) -> None:
        self._words = words.cast("Q")

    def of(self, engine: int) -> EngineState:
        return EngineState(self._words[engine] or EngineState.SERVING)


class DesiredStateWriter(DesiredStateReader):
    """The only writer of the desired states, in the coordinator."""

    def put(self, engine: int, state: EngineState) -> None:
        """Set the desired state with one aligned store. Raises ValueError for a state that cannot be desired."""
        if state not in (EngineState.SERVING, EngineState.DRAINING, EngineState.PARKED):
            raise ValueError(f"{state.name.lower()} cannot be the desired state of an engine")
        self._words[engine] = state


def served_without(engine: int, facts: Sequence[EngineFacts | None], desired_states: DesiredStateReader) -> bool:
    """Return True if an engine other than `engine` is serving and its desired state is SERVING."""
    return any(
        f is not None and f.state == EngineState.SERVING and desired_states.of(i) == EngineState.SERVING
        for i, f in enumerate(facts)
        if i != engine
    )
