"""Assigns device slots to requests: the index in `last_token` and in every per-slot array. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar
from weakref import ref

Holder = TypeVar("Holder")

DUMMY = 0
"""Slot of padding rows. No request has it."""


class Slots(Generic[Holder]):
    """Assigns slots 1..count to requests.

    A request keeps its slot while it exists and no other request needs the slot.

    This object is not notified when a request finishes: a slot becomes free when its request is garbage collected. If
    no slot is free, `assign` takes the slot of a request that is neither in this step nor in a step in flight. A
    request that comes back gets another slot, so the per-slot data must be rebuilt from the request.
    """

    def __init__(self, count: int) -> None:
        self._free = list(range(count, 0, -1))
        self._slot_of: dict[int, int] = {}  # by id(holder); the entry is removed before the id is reused
        self._references: dict[int, ref[Holder]] = {}  # by slot
        self._vacated: list[int] = []  # slots of collected holders; may still be in flight
        self._in_flight: list[Sequence[int]] = []

    def assign(self, holders: Sequence[Holder]) -> tuple[list[int], list[tuple[int, Holder]]]:
        """Return the slot of each of `holders`, and (slot, holder) of those that had no slot before.

        Raises ValueError if they and the steps in flight need more slots than exist.
        """
        slots = [self._slot_of.get(id(holder), DUMMY) for holder in holders]
        if DUMMY not in slots:
            return slots, []
        new = [i for i, slot in enumerate(slots) if slot == DUMMY]
        self._find_free(len(new), slots)
        fresh = []
        for i in new:
            slots[i] = self._give(holders[i])
            fresh.append((slots[i], holders[i]))
        return slots, fresh

    def take_back(self, fresh: Sequence[tuple[int, Holder]]) -> None:
        """Take back the slots that `assign` has just returned as new. No step with them may be in flight."""
        for slot, holder in fresh:
            del self._slot_of[id(holder)]
            self._release(slot)

    def begin(self, slots: Sequence[int]) -> None:
        """Record that a step with `slots` is in flight."""
        self._in_flight.append(slots)

    def end(self, slots: Sequence[int]) -> None:
        """Record that the step of this `slots` object has been collected."""
        self._in_flight = [step for step in self._in_flight if step is not slots]

    def _give(self, holder: Holder) -> int:
        slot = self._free.pop()
        key = id(holder)

        def on_collected(reference: ref[Holder]) -> None:
            if self._references.get(slot) is reference:
                del self._slot_of[key]
                self._vacated.append(slot)

        self._slot_of[key] = slot
        self._references[slot] = ref(holder, on_collected)
        return slot

    def _find_free(self, wanted: int, own: Sequence[int]) -> None:
        """Make `wanted` slots free. If needed, take slots from holders outside `own`."""
        in_flight = {slot for step in self._in_flight for slot in step}
        vacated, self._vacated = self._vacated, []
        for slot in vacated:
            if slot in in_flight:
                self._vacated.append(slot)
            else:
                self._release(slot)
        if len(self._free) >= wanted:
            return
        busy = in_flight.union(own)
        for key, slot in list(self._slot_of.items()):
            if slot not in busy and self._slot_of.pop(key, None) is not None:  # otherwise it was collected just now
                self._release(slot)
            if len(self._free) >= wanted:
                return
        raise ValueError(
            f"{wanted} requests need a slot and {len(self._free)} are left: more requests in one step, "
            "or more steps in flight, than the engine has slots for"
        )

    def _release(self, slot: int) -> None:
        del self._references[slot]
        self._free.append(slot)
