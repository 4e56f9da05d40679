"""Whether this engine takes new work: as the coordinator wishes."""

from __future__ import annotations

from daemon.engine.migration.llumlet import Llumlet
from daemon.ipc.desired_state import DesiredStateReader
from daemon.ipc.fabric import Fabric
from daemon.ipc.messages import EngineState

DEADLINE = 5.0  # seconds within which whoever changes its state gives a sign of life


class Standing:
    """The engine's state: SERVING, DRAINING or PARKED; LOADING before the wish was first heeded."""

    def __init__(self, fabric: Fabric, llumlet: Llumlet) -> None:
        _, self._me = fabric.topology.role(fabric.process)
        self._incarnation = fabric.incarnation
        self._progress = fabric.progress(fabric.process)
        self._desired_states = DesiredStateReader(fabric.desired_states())
        self._llumlet = llumlet
        self.state = EngineState.LOADING

    def apply(self) -> None:
        """Do as is wished; one load if that is nothing new."""
        wished = self._desired_states.of(self._me)
        if wished == self.state:
            return
        self.state = wished
        self._llumlet.accept(wished == EngineState.SERVING)
        self._progress.enter(wished, self._incarnation, DEADLINE)
