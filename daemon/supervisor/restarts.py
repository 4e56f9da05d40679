"""When a child that has died starts again, and whether a frontend goes on with its predecessor's responses. Pure."""

from __future__ import annotations

from typing import NamedTuple

FIRST_BACKOFF = 0.2  # seconds
MAX_BACKOFF = 30.0
MAX_KILLED_BACKOFF = 1.0  # for a frontend that a signal from outside has killed
WORKED_BEATS = 2  # of a frontend that has served; if it was killed from outside it did nothing wrong
HEALTHY_AFTER = 60.0  # seconds of uptime after which the back-off starts again
HEALTHY_BEATS = 10  # of a frontend, which beats once a second while it works
FAILED_ADOPTIONS = 3  # in a row, after which the next frontend adopts nothing
KILLED_ADOPTIONS = 10  # the same if signals from outside have ended them


class Death(NamedTuple):
    """How an incarnation has ended. `beats`: signs of life. `killed`: by SIGKILL, not from the supervisor."""

    uptime: float  # seconds
    beats: int
    killed: bool


class DoublingDelay:
    """Delays in seconds, each twice the one before: from `first` up to `most`. The one after a 0 is `least`."""

    def __init__(self, first: float, most: float, least: float = 0.0) -> None:
        self._next = self._first = first
        self._most = most
        self._least = least

    def reset(self) -> None:
        """Begin with the first delay again."""
        self._next = self._first

    def next(self) -> float:
        """Return the next delay."""
        delay, self._next = self._next, min(self._most, max(self._least, self._next * 2))
        return delay


class Backoff(DoublingDelay):
    """The delays of one child's restarts."""

    def __init__(self, *, frontend: bool) -> None:
        """`frontend`: clients wait for it, so the first restart is immediate, and health is counted in beats."""
        super().__init__(0.0 if frontend else FIRST_BACKOFF, MAX_BACKOFF, FIRST_BACKOFF)
        self._frontend = frontend

    def after(self, death: Death) -> float:
        """Return the seconds until the restart."""
        needed = WORKED_BEATS if death.killed else HEALTHY_BEATS
        healthy = death.beats >= needed if self._frontend else death.uptime > HEALTHY_AFTER
        if healthy:
            self.reset()
        delay = self.next()
        return min(delay, MAX_KILLED_BACKOFF) if self._frontend and death.killed else delay


class Succession:
    """Whether the next incarnation of one frontend adopts: it goes on with the responses of its predecessors.

    A response must not kill its frontend for ever. So after several incarnations that have adopted and died soon, the
    next one starts with nothing: the responses are cut, and the daemon serves on. A signal from outside counts only
    against an incarnation that has hardly served: any other has brought its responses forward.
    """

    def __init__(self) -> None:
        self.adopts = False  # of the next incarnation; the first one has no predecessor
        self._failed = 0
        self._killed = 0

    def on_death(self, death: Death) -> None:
        """Decide about the successor of an incarnation that has ended."""
        if not self.adopts or death.beats >= HEALTHY_BEATS:
            self._failed = self._killed = 0
        elif death.killed:
            self._killed += death.beats < WORKED_BEATS
        else:
            self._failed += 1
        self.adopts = self._failed < FAILED_ADOPTIONS and self._killed < KILLED_ADOPTIONS

    def on_handover(self) -> None:
        """Have the successor of an incarnation that has handed over adopt; forget the deaths before."""
        self._failed = self._killed = 0
        self.adopts = True
