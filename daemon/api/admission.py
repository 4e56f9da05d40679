"""Admission: places for unfinished requests, and room in the journal, divided between a frontend's clients. Pure.

Requests beyond the limits get status 429. Two rules keep the burst of one client from refusing all others:

- A reserve, a part of both, is for urgent requests only: those of high priority, below 0.
- A client that is told apart from others may hold at most three times as much as stays free, so there is always room
  for another one. A client without competition gets three quarters, two greedy ones get three sevenths each. What a
  client holds for its urgent requests counts apart.
"""

from __future__ import annotations

from collections import Counter
from types import TracebackType
from typing import NamedTuple

from daemon.api.generator import Overloaded, TooMany

_RESERVE = 8  # the reserve is one such part
_SHARE = 3  # a client may hold so many times what stays free


class Holder(NamedTuple):
    """What a request's place counts for: its client ("": not told apart from others) and whether it is urgent."""

    client: str
    urgent: bool


class Shares:
    """One resource: how much each holder has, and whether it may take more."""

    def __init__(self, capacity: int, reserve: int) -> None:
        """`capacity`: all there is. `reserve`: the part of it for urgent requests only."""
        self._capacity = capacity
        self._reserve = reserve
        self._held: Counter[Holder] = Counter()
        self.used = 0

    def largest(self, holder: Holder) -> int:
        """Return the most that `holder` can take at once."""
        room = self._room(holder)
        return max(1, room * _SHARE // (_SHARE + 1)) if holder.client else room

    def fits(self, holder: Holder, amount: int) -> bool:
        """Return True if `holder` may take `amount` now. If nothing is held, it may take anything there is."""
        if not self.used:
            return amount <= self._capacity
        free = self._room(holder) - self.used
        if amount > free:
            return False
        # At least 1: a client that holds nothing may take the last one.
        return not holder.client or self._held[holder] + amount <= max(_SHARE * (free - amount), 1)

    def add(self, holder: Holder, amount: int) -> None:
        """Record that `holder` has taken `amount`; a negative amount gives it back."""
        self.used += amount
        self._held[holder] += amount
        if not self._held[holder]:
            del self._held[holder]

    def held(self, holder: Holder) -> int:
        return self._held[holder]

    def _room(self, holder: Holder) -> int:
        return self._capacity - (0 if holder.urgent else self._reserve)


class Admission:
    """The limits of one frontend.

    A place is taken before any work for a request, so that a burst is not tokenised only to be refused. It is held
    until the request is submitted; from then on the request itself holds one until it ends. Its reservation in the
    journal lasts until its output is delivered.
    """

    def __init__(self, max_queued: int, journal_bytes: int, journal_slots: int, max_per_client: int = 0) -> None:
        """`max_queued`: places, besides a reserve of an eighth as many. Each needs a slot of the journal.

        `max_per_client`: places that a client which is told apart from others may have; 0: as many as its share.
        """
        places = min(max_queued, max(1, journal_slots * _RESERVE // (_RESERVE + 1) - 1))
        reserve = max(1, places // _RESERVE)
        self._places = Shares(places + reserve, reserve)
        self._max_per_client = max_per_client
        self._journal = Shares(journal_bytes, journal_bytes // _RESERVE)

    def take(self, count: int, holder: Holder) -> Places:
        """Take `count` places; those that are not submitted are released on exit.

        Raises Overloaded if fewer are left, TooMany if there never are as many.
        """
        most = self._places.largest(holder)
        limited = bool(self._max_per_client and holder.client)
        most = min(most, self._max_per_client) if limited else most
        if count > most:
            raise TooMany(
                f"A request may have at most {most} choices here, this one has {count}. Send several requests."
            )
        if not self._places.fits(holder, count):
            raise Overloaded(self._reason(holder))
        if limited and sum(self._places.held(Holder(holder.client, u)) for u in (False, True)) + count > most:
            raise Overloaded(f"{self._reason(holder)}; a client may have at most {most}")
        return Places(self._places, holder, count)

    def check_journal(self, count: int, holder: Holder, journal_bytes: int) -> None:
        """Raise TooMany if the journal never has room for `count` choices that need `journal_bytes` together.

        One choice may take all that an empty journal has, so it is never refused here.
        """
        most = self._journal.largest(holder)
        if count > 1 and journal_bytes > most:
            raise TooMany(
                f"The {count} choices of this request need {journal_bytes} bytes of the journal together, and may "
                f"have at most {most} here. Send several requests, or ask for fewer output tokens or logprobs."
            )

    def open(self, holder: Holder, journal_bytes: int) -> None:
        """Record a submitted request and its reservation in the journal. Raises Overloaded if there is no room."""
        if not self._journal.fits(holder, journal_bytes):
            raise Overloaded("the journal has no room for another request; try again shortly")
        self._places.add(holder, 1)
        self._journal.add(holder, journal_bytes)

    def keep(self, holder: Holder, journal_bytes: int, *, unfinished: bool) -> None:
        """Record a request of a predecessor, whatever the limits are."""
        if unfinished:
            self._places.add(holder, 1)
        self._journal.add(holder, journal_bytes)

    def end(self, holder: Holder) -> None:
        """Give back the place of a request that has ended. Its reservation stays until `free`."""
        self._places.add(holder, -1)

    def free(self, holder: Holder, journal_bytes: int) -> None:
        """Give back the reservation of a request that has ended."""
        self._journal.add(holder, -journal_bytes)

    def _reason(self, holder: Holder) -> str:
        own = f", {self._places.held(holder)} of this client" if holder.client else ""
        return f"{self._places.used} requests are queued or running{own}; try again shortly"


class Places:
    """Places of requests that are admitted and not submitted yet. A context: they are held inside it."""

    def __init__(self, places: Shares, holder: Holder, count: int) -> None:
        self._places = places
        self._holder = holder
        self._count = count

    def __enter__(self) -> Places:
        self._places.add(self._holder, self._count)
        return self

    def submitted(self) -> None:
        """Release one place: the request that was just submitted holds one itself."""
        self._places.add(self._holder, -1)
        self._count -= 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._places.add(self._holder, -self._count)
