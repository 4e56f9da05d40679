"""The faults of a run, as a function of its seed. Pure.

A schedule respects what the daemon documents as its limits: a frontend that dies soon after its start, again and
again, starts with nothing in the end (`supervisor/restarts`), so each frontend gets a rest after a few deaths.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from random import Random

from bench.nemesis.steps import MIGRATION_STEPS, RESPONSE_STEPS, STEPS, SUCCESSION_STEPS

COORDINATOR, STANDBY, SUPERVISOR = "coordinator", "standby frontend", "supervisor"
REST = 16.0  # seconds without a death after which a frontend counts as healthy: it has shown ten signs of life
DEATHS_IN_A_ROW = 7  # of a frontend, between two rests; ten in a row are too many
LONG_PAUSE = 1.5  # seconds; well below every deadline


class Kind(StrEnum):
    KILL = "kill"  # SIGKILL
    PAUSE = "pause"  # SIGSTOP, and SIGCONT before anything is overdue
    HANG = "hang"  # SIGSTOP until the supervisor kills the process
    STEP_KILL = "kill at a step"  # SIGKILL when a process comes to a named step
    STEP_PAUSE = "pause at a step"
    RESTART = "restart"  # llumctl restart
    DRAIN = "drain"  # and undrain
    PARK = "park"  # and wake
    FLOOD = "flood"  # requests that fill a part of the memory, whose clients read nothing and then hang up


@dataclass(frozen=True)
class Fault:
    """One fault. `gap`: seconds after the one before.

    `targets`: processes; an engine that is down is replaced by the next one that runs. `seconds`: for how long.
    `step`: at which step, of the first process that comes to it. `trigger`: what makes processes come to it.
    """

    number: int
    gap: float
    kind: Kind
    targets: tuple[str, ...]
    seconds: float = 0.0
    step: str = ""
    trigger: str = ""  # "moves", "death" or "restart" of the frontend in `targets`; empty: the load is enough

    def __str__(self) -> str:
        words = [f"{self.number:4} +{self.gap:.2f}s {self.kind} {', '.join(self.targets)}"]
        if self.step:
            words.append(f"{self.step!r} ({self.trigger or 'load'})")
        if self.seconds:
            words.append(f"for {self.seconds:.2f} s")
        return " ".join(words)


@dataclass(frozen=True)
class Shape:
    """What runs. `hangs`: of a frontend or the coordinator, which take half a minute each."""

    engines: int
    frontends: int
    pace: float = 0.4  # mean seconds between two faults
    hangs: bool = True


WEIGHTS = {
    Kind.KILL: 26,
    Kind.PAUSE: 16,
    Kind.HANG: 2,
    Kind.STEP_KILL: 42,
    Kind.STEP_PAUSE: 5,
    Kind.RESTART: 3,
    Kind.DRAIN: 3,
    Kind.PARK: 3,
    Kind.FLOOD: 2,
}
STAGES = ((MIGRATION_STEPS, ("moves",)), (RESPONSE_STEPS, ("",)), (SUCCESSION_STEPS, ("death", "death", "restart")))


def plan(seed: int, count: int, shape: Shape) -> list[Fault]:
    """Return `count` faults."""
    return list(_Planner(seed, shape).faults(count))


class _Planner:
    def __init__(self, seed: int, shape: Shape) -> None:
        self._rng = Random(f"faults {seed}")
        self._shape = shape
        self._now = 0.0
        self._deaths: dict[int, list[float]] = {k: [] for k in range(shape.frontends)}  # since the last rest
        self._order_ends = 0.0  # of the engine that is drained or parked: one at a time
        self._hang_ends = {"frontend": 0.0, "engine": 0.0, COORDINATOR: 0.0}
        self._decks: list[list[str]] = [[] for _ in STAGES]  # steps that are still to come, before any comes again

    def faults(self, count: int) -> list[Fault]:
        found: list[Fault] = []
        while len(found) < count:
            gap = round(min(4 * self._shape.pace, self._rng.expovariate(1 / self._shape.pace)), 3)
            kind = self._rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
            self._now += gap
            fault = self._fault(len(found), gap, kind)
            if fault is not None:
                found.append(fault)
            else:
                self._now -= gap
        return found

    def _fault(self, number: int, gap: float, kind: Kind) -> Fault | None:
        """Return a fault of this kind; None if the limits do not allow it now."""
        make = {
            Kind.KILL: self._kill,
            Kind.PAUSE: self._pause,
            Kind.HANG: self._hang,
            Kind.RESTART: self._restart,
            Kind.FLOOD: self._flood,
        }.get(kind)
        if make is not None:
            return make(number, gap)
        if kind in (Kind.DRAIN, Kind.PARK):
            return self._order(number, gap, kind)
        return self._at_step(number, gap, kind)

    def _kill(self, number: int, gap: float) -> Fault | None:
        targets = self._victims()
        return Fault(number, gap, Kind.KILL, targets) if targets else None

    def _pause(self, number: int, gap: float) -> Fault:
        names = [*self._engines(), *self._frontends(), COORDINATOR, STANDBY, SUPERVISOR]
        seconds = self._rng.choice((0.02, 0.2, LONG_PAUSE)) * self._rng.uniform(0.5, 1)
        return Fault(number, gap, Kind.PAUSE, (self._rng.choice(names),), round(seconds, 3))

    def _restart(self, number: int, gap: float) -> Fault | None:
        name = self._rng.choice([*self._engines(), *self._frontends(), COORDINATOR])
        if name.startswith("frontend") and not self._die(int(name.split()[1])):
            return None
        return Fault(number, gap, Kind.RESTART, (name,))

    def _flood(self, number: int, gap: float) -> Fault:
        what = self._rng.choice(("journal", "outbox"))
        return Fault(number, gap, Kind.FLOOD, (what,), round(self._rng.uniform(0.5, 4), 3))

    def _engines(self) -> list[str]:
        return [f"engine {i}" for i in range(self._shape.engines)]

    def _frontends(self) -> list[str]:
        return [f"frontend {k}" for k in range(self._shape.frontends)]

    def _victims(self) -> tuple[str, ...]:
        """Return the processes to kill, one or several at once; none if a frontend among them needs its rest."""
        rng = self._rng
        draw = rng.random()
        if draw < 0.3:
            chosen = [rng.choice(self._frontends())]
        elif draw < 0.55:
            chosen = [rng.choice(self._engines())]
        elif draw < 0.7:
            chosen = [COORDINATOR]
        elif draw < 0.8:
            chosen = [STANDBY]
        elif draw < 0.85:
            chosen = self._frontends()
        elif draw < 0.95:
            chosen = [rng.choice(self._frontends()), rng.choice(self._engines())]
        else:
            chosen = [*self._engines(), *self._frontends(), COORDINATOR]
        frontends = [int(name.split()[1]) for name in chosen if name.startswith("frontend")]
        return tuple(chosen) if self._die(*frontends) else ()

    def _hang(self, number: int, gap: float) -> Fault | None:
        kinds = ["engine", "engine", "frontend", COORDINATOR] if self._shape.hangs else ["engine"]
        kind = self._rng.choice(kinds)
        if self._now < self._hang_ends[kind]:
            return None
        name = {"engine": self._engines(), "frontend": self._frontends()}.get(kind, [COORDINATOR])
        chosen = self._rng.choice(name)
        self._hang_ends[kind] = self._now + (15.0 if kind == "engine" else 60.0)
        if kind == "frontend" and not self._die(int(chosen.split()[1]), times=DEATHS_IN_A_ROW):
            return None
        return Fault(number, gap, Kind.HANG, (chosen,))

    def _at_step(self, number: int, gap: float, kind: Kind) -> Fault | None:
        rng = self._rng
        stage = rng.randrange(len(STAGES))
        steps, triggers = STAGES[stage]
        deck = self._decks[stage]
        if not deck:
            deck += rng.sample(sorted(steps), len(steps))
        step, trigger = deck[-1], rng.choice(triggers)
        frontend = rng.randrange(self._shape.frontends)
        dies = kind is Kind.STEP_KILL and STEPS[step].role == "frontend"
        if steps is SUCCESSION_STEPS:  # the frontend, then its successor
            allowed = self._die(frontend, times=1 + dies)
        else:  # any of them
            allowed = not dies or self._die(*self._deaths)
        if not allowed:
            return None
        deck.pop()
        targets = (f"frontend {frontend}",) if steps is SUCCESSION_STEPS else ()
        seconds = round(rng.uniform(0.05, 1.0), 3) if kind is Kind.STEP_PAUSE else 0.0
        return Fault(number, gap, kind, targets, seconds, step, trigger)

    def _order(self, number: int, gap: float, kind: Kind) -> Fault | None:
        if self._now < self._order_ends:
            return None
        seconds = round(self._rng.uniform(0.2, 4), 3)
        self._order_ends = self._now + seconds + 1
        return Fault(number, gap, kind, (self._rng.choice(self._engines()),), seconds)

    def _die(self, *frontends: int, times: int = 1) -> bool:
        """Record a death of each of these frontends; return False, and record nothing, if one of them needs a rest.

        `times`: as how many deaths it counts.
        """
        recent = {k: [] if self._rested(k) else self._deaths[k] for k in frontends}
        if any(len(deaths) + times > DEATHS_IN_A_ROW for deaths in recent.values()):
            return False
        for k, deaths in recent.items():
            self._deaths[k] = deaths + [self._now] * times
        return True

    def _rested(self, frontend: int) -> bool:
        deaths = self._deaths[frontend]
        return bool(deaths) and self._now - deaths[-1] >= REST
