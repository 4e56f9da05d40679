"""Auto-scaling: ask `policy.scaling` what to do, and set the desired states of engines accordingly."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from daemon.config import Config
from daemon.control.desired_states import DesiredStates
from daemon.control.policy.freeness import policy_of
from daemon.control.policy.scaling import Action, Park, ScalingRules, ScalingState, Wake, average_freeness, decide
from daemon.ipc.messages import EngineFacts, EngineState

log = logging.getLogger(__name__)


class Autoscaler:
    """Wakes and parks engines by load. It does nothing unless `config.min_engines` is set."""

    def __init__(self, desired_states: DesiredStates, config: Config, engines: int) -> None:
        self._desired_states = desired_states
        self._state = ScalingState()
        self._rules: ScalingRules | None = None
        if config.min_engines:
            max_engines = config.max_engines or engines
            policy = policy_of(config.policy, config.headroom)
            self._rules = ScalingRules.of(policy, max_engines, config.min_engines, config.scale_period)

    @property
    def enabled(self) -> bool:
        """True if auto-scaling is configured."""
        return self._rules is not None

    def cycle(
        self, facts: Sequence[EngineFacts | None], projected: Sequence[EngineFacts | None], now: float
    ) -> list[Action]:
        """Run one period and return the actions taken.

        `projected`: `facts` as `policy.projection.project` returns them. `now` in seconds, any clock.
        """
        if self._rules is None:
            return []
        decided, self._state = decide(projected, self._state, now, self._rules)
        # Never park the last engine that serves now, even if another one is loading and will soon serve.
        taken = [a for a in decided if isinstance(a, Wake) or self._desired_states.served_without(a.engine, facts)]
        for action in taken:
            self._execute(action, projected, self._rules)
        return taken

    def _execute(self, action: Action, projected: Sequence[EngineFacts | None], rules: ScalingRules) -> None:
        engines = {i: f for i, f in enumerate(projected) if f is not None}
        serving = {i for i, f in engines.items() if f.state == EngineState.SERVING}
        freeness = average_freeness(engines, serving, rules.policy)
        verb = "parked" if isinstance(action, Park) else "woken"
        log.info(
            "engine %d is %s: %d engines serve at a freeness of %.0f tokens a request "
            "(an engine is woken below %.0f, and parked if the others stay above %.0f; %d to %d engines)",
            *(action.engine, verb, len(serving), freeness, rules.low, rules.high),
            *(rules.min_engines, rules.max_engines),
        )
        state = EngineState.PARKED if isinstance(action, Park) else EngineState.SERVING
        self._desired_states.set(action.engine, state, by="auto-scaling")
