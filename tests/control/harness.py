"""The coordinator's objects on real shared memory, with facts in place of engines."""

from __future__ import annotations

from daemon.config import Config
from daemon.control.autoscaler import Autoscaler
from daemon.control.desired_states import DesiredStates
from daemon.control.event_history import EventHistory
from daemon.control.policy.projection import project
from daemon.control.policy.scaling import Action
from daemon.ipc.event_ring import EventWriter
from daemon.ipc.fabric import COORDINATOR, Fabric, FabricHandles
from daemon.ipc.messages import EngineFacts, EngineState


class Coordinator:
    """`up[i]`: the facts that engine i publishes. `predecessors[i]`: its predecessor's last facts while i loads."""

    def __init__(self, handles: FabricHandles, config: Config, *up: EngineFacts | None) -> None:
        fabric = Fabric(handles, COORDINATOR, 1)
        self.up: list[EngineFacts | None] = list(up)
        self.predecessors: list[EngineFacts | None] = [None] * len(up)
        self.desired_states = DesiredStates(fabric, EventWriter(fabric.events(COORDINATOR)))
        self.autoscaler = Autoscaler(self.desired_states, config, len(up))
        self.now = 0.0
        self._history = EventHistory(fabric)

    @property
    def desired(self) -> list[EngineState]:
        """The desired state of each engine."""
        return [self.desired_states.of(i) for i in range(len(self.up))]

    def order(self, engine: int, state: EngineState, action: str = "") -> None:
        """Set the desired state as the admin API does for an operator. Raises Refusal."""
        self.desired_states.check(self.up, engine, state)
        self.desired_states.set(engine, state, by="an operator", action=action)

    def cycle(self, seconds: float = 0.0) -> list[Action]:
        """Run the autoscaler's next period, `seconds` after the last one."""
        self.now += seconds
        return self.autoscaler.cycle(self.up, project(self.up, self.predecessors, self.desired), self.now)

    def orders(self) -> list[tuple[str, int, str]]:
        """Return action, engine and author of each order in the event log since the last call."""
        return [(row["action"], row["engine"], row["by"]) for row in self._history.read()]
