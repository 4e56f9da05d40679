"""Auto-scaling's deeds: `scaling` decides, this writes the wishes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from daemon.config import Config
from daemon.control.policy.freeness import policy_of
from daemon.control.policy.scaling import Action, Park, ScalingRules, ScalingState, Wake, average, decide
from daemon.ipc.desired_state import DesiredStateReader, served_without
from daemon.ipc.messages import EngineFacts, EngineState

log = logging.getLogger(__name__)

SetState = Callable[[int, EngineState], None]


class Autoscaler:
    """Wakes and parks engines by load. `wish` carries out; it does nothing unless `config.min_engines` is set."""

    def __init__(self, desired_states: DesiredStateReader, wish: SetState, config: Config, engines: int) -> None:
        self._desired_states = desired_states
        self._set_state = wish
        self._state = ScalingState()
        self._rules: ScalingRules | None = None
        if config.min_engines:
            most = config.max_engines or engines
            judge = policy_of(config.policy, config.headroom)
            self._rules = ScalingRules.of(judge, most, config.min_engines, config.scale_period)

    @property
    def on(self) -> bool:
        """Whether there is anything for it to do."""
        return self._rules is not None

    def cycle(
        self, facts: Sequence[EngineFacts | None], expected: Sequence[EngineFacts | None], now: float
    ) -> list[Action]:
        """One period; what was done. `expected`: see `outlook`. `now` in seconds, any clock."""
        if self._rules is None:
            return []
        wanted, self._state = decide(expected, self._state, now, self._rules)
        # Never the last that answers now, though another that still loads would soon do.
        done = [a for a in wanted if isinstance(a, Wake) or served_without(a.engine, facts, self._desired_states)]
        for action in done:
            self._carry_out(action, expected, self._rules)
        return done

    def _carry_out(self, action: Action, expected: Sequence[EngineFacts | None], rules: ScalingRules) -> None:
        engines = {i: f for i, f in enumerate(expected) if f is not None}
        serving = {i for i, f in engines.items() if f.state == EngineState.SERVING}
        free = average(engines, serving, rules.policy)
        verb = "parked" if isinstance(action, Park) else "woken"
        log.info(
            "engine %d is %s: %d engines serve at a freeness of %.0f tokens a request (woken below %.0f, "
            "parked if above %.0f without one; %d to %d engines)",
            *(action.engine, verb, len(serving), free, rules.low, rules.high),
            *(rules.min_engines, rules.max_engines),
        )
        self._set_state(action.engine, EngineState.PARKED if isinstance(action, Park) else EngineState.SERVING)
