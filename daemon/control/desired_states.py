"""The one way to change the desired state of an engine, for operators and for auto-scaling."""

from __future__ import annotations

from collections.abc import Sequence

from daemon.control.refusal import Refusal, no_engine
from daemon.ipc.desired_state import DesiredStateWriter, served_without
from daemon.ipc.event_ring import EventWriter
from daemon.ipc.events import Ordered
from daemon.ipc.fabric import Fabric
from daemon.ipc.messages import EngineFacts, EngineState

_ACTIONS = {EngineState.SERVING: "wake", EngineState.DRAINING: "drain", EngineState.PARKED: "park"}


class DesiredStates:
    """The desired state of each engine: SERVING, DRAINING or PARKED. Only the coordinator writes it."""

    def __init__(self, fabric: Fabric, events: EventWriter) -> None:
        self._fabric = fabric
        self._events = events
        self._words = DesiredStateWriter(fabric.desired_states())

    def of(self, engine: int) -> EngineState:
        """Return the desired state of `engine`."""
        return self._words.of(engine)

    def set(self, engine: int, state: EngineState, *, by: str, action: str = "") -> None:
        """Store the desired state, ring the engine's doorbell and write the `Ordered` event.

        The engine reads the new state at once. The supervisor, which starts a parked engine again, reads it at its
        next tick. `by` and `action` go into the event; the default action is "wake", "drain" or "park" by `state`.
        """
        self._words.put(engine, state)
        self._fabric.ring_bell(self._fabric.topology.engine(engine))
        self._events.write(Ordered(action or _ACTIONS[state], "", engine, "", by))

    def served_without(self, engine: int, facts: Sequence[EngineFacts | None]) -> bool:
        """Return True if an engine other than `engine` serves, and its desired state is SERVING too."""
        return served_without(engine, facts, self._words)

    def check(self, facts: Sequence[EngineFacts | None], engine: int, state: EngineState) -> None:
        """Raise Refusal if an operator may not set `engine` to `state`.

        The engine must exist, and an engine must go on serving. An engine that is down may be drained or parked: that
        ends the restarts of one that dies again and again.
        """
        if not 0 <= engine < len(facts):
            raise no_engine(engine)
        if state == EngineState.SERVING or self.of(engine) != EngineState.SERVING:
            return
        if not self.served_without(engine, facts):
            last = f"engine {engine} is the last that serves" if facts[engine] is not None else "no engine serves"
            raise Refusal(f"{last}; no other engine could take its requests")
