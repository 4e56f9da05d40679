"""Auto-scaling: how many engines serve (Llumnix, section 4.4.3). Pure.

The measure is the average freeness for normal requests over all engines, that is without headroom. It is pooled:
the room of all engines divided by all requests, so that an idle engine counts with its capacity and not as
infinity. If the average stays below the low threshold for a period, engines are woken until it would be above the
low threshold again. If the average would stay above the high threshold without the engine that runs the fewest
requests, that engine is parked: it drains by migration and ends when it is empty. Parked engines that still drain
are woken first. The facts hold which engines are parked, so that a restarted coordinator goes on where its
predecessor stopped. An engine that an operator drains is never woken here.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from daemon.control.policy.freeness import LLUMD, SERVING, Policy
from daemon.ipc.messages import EngineFacts, EngineState


class Wake(NamedTuple):
    """Let a parked engine serve again, also if it still drains."""

    engine: int


class Park(NamedTuple):
    """Let an engine drain and end."""

    engine: int


Action = Wake | Park


class ScalingState(NamedTuple):
    """Since when (seconds) the average has been beyond a threshold; None if it is not."""

    below_low_since: float | None = None
    above_high_since: float | None = None


@dataclass(frozen=True, slots=True)
class ScalingRules:
    """Thresholds are freeness in tokens a request. Raises ValueError for values that make no sense."""

    max_engines: int
    min_engines: int = 1
    policy: Policy = LLUMD
    low: float = LLUMD.thresholds.scale_low
    high: float = LLUMD.thresholds.scale_high
    period: float = 10.0  # seconds that the average must stay beyond a threshold without a break

    def __post_init__(self) -> None:
        if not 1 <= self.min_engines <= self.max_engines:
            raise ValueError(f"{self.min_engines} to {self.max_engines} engines is no range above 0")
        if not self.low < self.high:
            raise ValueError(f"the low threshold {self.low:g} does not lie below the high threshold {self.high:g}")

    @classmethod
    def of(cls, policy: Policy, max_engines: int, min_engines: int = 1, period: float = 10.0) -> ScalingRules:
        """Return rules with the policy's own thresholds."""
        thresholds = policy.thresholds
        return cls(max_engines, min_engines, policy, thresholds.scale_low, thresholds.scale_high, period)


def decide(
    facts: Sequence[EngineFacts | None], state: ScalingState, now: float, rules: ScalingRules
) -> tuple[list[Action], ScalingState]:
    """Return the actions to take now (mostly none) and the state for the next call. `now` in seconds, any clock.

    Several engines may be woken at once, but only one is parked. A full period passes between actions, unless the
    number of serving engines is outside [min_engines, max_engines]: that is corrected at once.
    """
    engines = {i: f for i, f in enumerate(facts) if f is not None}
    serving = {i for i, f in engines.items() if f.state == SERVING}
    if len(serving) < rules.min_engines:
        return [Wake(i) for i in _parked(engines)[: rules.min_engines - len(serving)]], ScalingState()
    if len(serving) > rules.max_engines:
        return [Park(_least_busy(engines, serving))], ScalingState()
    below_low = average_freeness(engines, serving, rules.policy) < rules.low
    rest = serving - {_least_busy(engines, serving)}
    above_high = average_freeness(engines, rest, rules.policy) > rules.high
    state = ScalingState(
        _update_since(below_low, state.below_low_since, now), _update_since(above_high, state.above_high_since, now)
    )
    actions: list[Action] = []
    if _has_lasted(state.below_low_since, now, rules):
        actions += [Wake(i) for i in _engines_to_wake(engines, serving, rules)]
    elif _has_lasted(state.above_high_since, now, rules) and len(serving) > rules.min_engines:
        actions.append(Park(_least_busy(engines, serving)))
    return actions, ScalingState() if actions else state


def average_freeness(engines: Mapping[int, EngineFacts], serving: Collection[int], policy: Policy = LLUMD) -> float:
    """Return the freeness of the pool if the engines in `serving` served: the least over the resources.

    The freeness of a resource is its room over its requests, in tokens a request. The load of engines that do not
    serve counts too: it will move to the others. Infinite without requests.
    """
    loads = [policy.resource_loads(f) for i, f in engines.items() if i in serving or f.running + f.waiting]
    lost = [policy.resource_loads(f) for i, f in engines.items() if i not in serving and f.running + f.waiting]
    capacity_lost = [sum(load.capacity for load in column) for column in zip(*lost, strict=True)]
    averages = []
    for k, column in enumerate(zip(*loads, strict=True)):
        room = sum(load.room for load in column) - (capacity_lost[k] if lost else 0.0)
        batch = sum(load.batch for load in column)
        averages.append(room / batch if batch else math.inf)
    return min(averages, default=math.inf)


def _engines_to_wake(engines: Mapping[int, EngineFacts], serving: set[int], rules: ScalingRules) -> list[int]:
    """Return as many parked engines as bring the average back to the low threshold, within max_engines."""
    woken: list[int] = []
    for i in _parked(engines)[: rules.max_engines - len(serving)]:
        if average_freeness(engines, serving | {*woken}, rules.policy) >= rules.low:
            break
        woken.append(i)
    return woken


def _parked(engines: Mapping[int, EngineFacts]) -> list[int]:
    """Return the parked engines, the busiest first: one that still drains serves again at no cost."""
    parked = [i for i, f in engines.items() if f.state == EngineState.PARKED]
    return sorted(parked, key=lambda i: -engines[i].running - engines[i].waiting)


def _least_busy(engines: Mapping[int, EngineFacts], serving: set[int]) -> int:
    """Return the serving engine with the fewest running requests; of equals the last, to keep the low numbers up."""
    return min(serving, key=lambda i: (engines[i].running, engines[i].waiting, -i))


def _update_since(beyond: bool, since: float | None, now: float) -> float | None:
    if not beyond:
        return None
    return now if since is None else since


def _has_lasted(since: float | None, now: float, rules: ScalingRules) -> bool:
    return since is not None and now - since >= rules.period
