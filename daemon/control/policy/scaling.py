"""How many engines serve (Llumnix, section 4.4.3, auto-scaling). Pure.

The measure is the average freeness for normal requests over all engines, that is without headroom, pooled: all
room over all requests, so that an idle engine counts as its capacity and not as infinity. If it stays below the
low mark for a period, engines are woken until the average would be back above it; if it would stay above the high
mark without the engine that runs the fewest requests, that one is parked: it drains by migration and sleeps when
empty. Waking takes back an engine that still drains first. The facts hold who is parked, so that a restarted
coordinator goes on where its predecessor stopped; what an operator drains is never woken here.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from daemon.control.policy.freeness import LLUMD, SERVING, Policy
from daemon.ipc.messages import EngineFacts, EngineState


class Wake(NamedTuple):
    """Let a parked engine serve again, also one that has not emptied yet."""

    engine: int


class Park(NamedTuple):
    """Let an engine drain and sleep."""

    engine: int


Action = Wake | Park


class ScalingState(NamedTuple):
    """Since when (seconds) the average has been beyond a mark; None: it is not."""

    short_since: float | None = None
    ample_since: float | None = None


@dataclass(frozen=True, slots=True)
class ScalingRules:
    """Marks are freeness in tokens a request. Raises ValueError if they cannot be used."""

    max_engines: int
    min_engines: int = 1
    policy: Policy = LLUMD
    low: float = LLUMD.marks.scale_low
    high: float = LLUMD.marks.scale_high
    period: float = 10.0  # seconds a mark must be passed without a break

    def __post_init__(self) -> None:
        if not 1 <= self.min_engines <= self.max_engines:
            raise ValueError(f"{self.min_engines} to {self.max_engines} engines is no range above 0")
        if not self.low < self.high:
            raise ValueError(f"the low mark {self.low:g} does not lie below the high mark {self.high:g}")

    @classmethod
    def of(cls, policy: Policy, max_engines: int, min_engines: int = 1, period: float = 10.0) -> ScalingRules:
        """With the policy's own marks."""
        return cls(max_engines, min_engines, policy, policy.marks.scale_low, policy.marks.scale_high, period)


def decide(
    facts: Sequence[EngineFacts | None], state: ScalingState, now: float, config: ScalingRules
) -> tuple[list[Action], ScalingState]:
    """What to do now (mostly nothing), and the state for the next call. `now` in seconds, any clock.

    Several engines may be woken at once, but only one is parked; a full period passes between actions, unless the
    number that serves lies outside [min_engines, max_engines]: that is put right at once.
    """
    engines = {i: f for i, f in enumerate(facts) if f is not None}
    serving = {i for i, f in engines.items() if f.state == SERVING}
    if len(serving) < config.min_engines:
        return [Wake(i) for i in _sleepers(engines)[: config.min_engines - len(serving)]], ScalingState()
    if len(serving) > config.max_engines:
        return [Park(_least_busy(engines, serving))], ScalingState()
    short_since, ample_since = state
    short = average(engines, serving, config.policy) < config.low
    ample = average(engines, serving - {_least_busy(engines, serving)}, config.policy) > config.high
    state = ScalingState(_since(short, short_since, now), _since(ample, ample_since, now))
    actions: list[Action] = []
    if _lasted(state.short_since, now, config):
        actions += [Wake(i) for i in _to_wake(engines, serving, config)]
    elif _lasted(state.ample_since, now, config) and len(serving) > config.min_engines:
        actions.append(Park(_least_busy(engines, serving)))
    return actions, ScalingState() if actions else state


def average(engines: Mapping[int, EngineFacts], serving: Collection[int], policy: Policy = LLUMD) -> float:
    """Freeness of the pool if `serving` served, tokens a request: the scarcest resource's room over its requests.

    Load counts wherever it is: what drains will go to the others. Infinite without requests.
    """
    loads = [policy.terms(f) for i, f in engines.items() if i in serving or f.running + f.waiting]
    lost = [policy.terms(f) for i, f in engines.items() if i not in serving and f.running + f.waiting]
    capacity_lost = [sum(term.capacity for term in column) for column in zip(*lost, strict=True)]
    shares = []
    for k, column in enumerate(zip(*loads, strict=True)):
        room = sum(term.room for term in column) - (capacity_lost[k] if lost else 0.0)
        batch = sum(term.batch for term in column)
        shares.append(room / batch if batch else math.inf)
    return min(shares, default=math.inf)


def _to_wake(engines: Mapping[int, EngineFacts], serving: set[int], config: ScalingRules) -> list[int]:
    """As many as bring the average back to the low mark, or as there may be."""
    woken: list[int] = []
    for i in _sleepers(engines)[: config.max_engines - len(serving)]:
        if average(engines, serving | {*woken}, config.policy) >= config.low:
            break
        woken.append(i)
    return woken


def _sleepers(engines: Mapping[int, EngineFacts]) -> list[int]:
    """Parked engines; first those that still drain, the busiest before others: to go on costs them nothing."""
    parked = [i for i, f in engines.items() if f.state == EngineState.PARKED]
    return sorted(parked, key=lambda i: -engines[i].running - engines[i].waiting)


def _least_busy(engines: Mapping[int, EngineFacts], serving: set[int]) -> int:
    """The serving engine with the fewest running requests; of several the last, as the first have the low numbers."""
    return min(serving, key=lambda i: (engines[i].running, engines[i].waiting, -i))


def _since(beyond: bool, since: float | None, now: float) -> float | None:
    if not beyond:
        return None
    return now if since is None else since


def _lasted(since: float | None, now: float, config: ScalingRules) -> bool:
    return since is not None and now - since >= config.period
