"""Which device slot a request has: its place in `last_token` and in every array kept by slot. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar
from weakref import ref

Holder = TypeVar("Holder")

DUMMY = 0
"""The slot of padding rows; no request has it."""


class Slots(Generic[Holder]):
    """Gives slots 1..count to requests; a request keeps its own while it lives and nobody else needs it.

    Nobody tells this object when a request has finished: its slot is free once the request is gone from memory,
    and where none is free, one whose request is neither in this step nor in one in flight is taken. A
    request that comes back gets another slot, so what is kept by slot must be rebuilt from the request.
    """

    def __init__(self, count: int) -> None:
        self._free = list(range(count, 0, -1))
        self._slot_of: dict[int, int] = {}  # by the holder's id; the entry goes before the id is reused
        self._references: dict[int, ref[Holder]] = {}  # by slot
        self._vacated: list[int] = []  # slots of holders that died; may still be in flight
        self._flights: list[Sequence[int]] = []

    def assign(self, holders: Sequence[Holder]) -> tuple[list[int], list[tuple[int, Holder]]]:
        """The slot of each of `holders`, and (slot, holder) of those that had none until now.

        Raises ValueError if they and the steps in flight need more slots than there are.
        """
        slots = [self._slot_of.get(id(holder), DUMMY) for holder in holders]
        if DUMMY not in slots:
            return slots, []
        newcomers = [i for i, slot in enumerate(slots) if slot == DUMMY]
        self._find_free(len(newcomers), slots)
        fresh = []
        for i in newcomers:
            slots[i] = self._give(holders[i])
            fresh.append((slots[i], holders[i]))
        return slots, fresh

    def begin(self, slots: Sequence[int]) -> None:
        """A step with `slots` is in flight from now on."""
        self._flights.append(slots)

    def end(self, slots: Sequence[int]) -> None:
        """The step that began with this very sequence has been collected."""
        self._flights = [flight for flight in self._flights if flight is not slots]

    def _give(self, holder: Holder) -> int:
        slot = self._free.pop()
        key = id(holder)

        def gone(reference: ref[Holder]) -> None:
            if self._references.get(slot) is reference:
                del self._slot_of[key]
                self._vacated.append(slot)

        self._slot_of[key] = slot
        self._references[slot] = ref(holder, gone)
        return slot

    def _find_free(self, wanted: int, mine: Sequence[int]) -> None:
        """Have `wanted` free slots, if need be at the cost of holders outside `mine`."""
        flying = {slot for flight in self._flights for slot in flight}
        vacated, self._vacated = self._vacated, []
        for slot in vacated:
            if slot in flying:
                self._vacated.append(slot)
            else:
                self._release(slot)
        if len(self._free) >= wanted:
            return
        busy = flying.union(mine)
        for key, slot in list(self._slot_of.items()):
            if slot not in busy and self._slot_of.pop(key, None) is not None:  # else it died this moment
                self._release(slot)
            if len(self._free) >= wanted:
                return
        raise ValueError(
            f"{wanted} requests need a slot and {len(self._free)} are left: more requests in one step, "
            "or more steps in flight, than the engine was made for"
        )

    def _release(self, slot: int) -> None:
        del self._references[slot]
        self._free.append(slot)
