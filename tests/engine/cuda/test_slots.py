"""Slots under any order of steps: nobody shares one, and none changes hands while a step in flight uses it."""

import gc
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.engine.cuda.slots import DUMMY, Slots


class Holder:
    """Stands for a request; told apart by its number, so that a test need not keep it alive."""

    _numbers = count()

    def __init__(self):
        self.number = next(self._numbers)


def test_a_request_keeps_its_slot():
    slots = Slots(4)
    a, b = Holder(), Holder()
    first, fresh = slots.assign([a, b])
    assert fresh == [(first[0], a), (first[1], b)]
    assert slots.assign([b, a]) == ([first[1], first[0]], [])


def test_the_slot_of_one_that_is_gone_is_used_again():
    slots = Slots(1)
    a = Holder()
    [slot], fresh = slots.assign([a])
    del a, fresh
    assert slots.assign([Holder()])[0] == [slot]


def test_too_many_at_a_time():
    slots = Slots(3)
    a, b = [Holder(), Holder()], [Holder(), Holder()]
    mine, _ = slots.assign(a)
    slots.begin(mine)
    with pytest.raises(ValueError, match="slot"):
        slots.assign(b)
    slots.end(mine)
    assert len(set(slots.assign(b)[0])) == 2


def test_a_waiting_request_gives_way_and_comes_back_as_new():
    slots = Slots(1)
    a, b = Holder(), Holder()
    slots.assign([a])
    assert slots.assign([b])[1]
    assert slots.assign([a])[1]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_interleaving(data):
    """At most two steps of at most four rows in flight, requests come, rest and go; eight slots."""
    rows, slots = 4, Slots(8)
    alive = [Holder() for _ in range(6)]
    flights = []
    number_of = {}  # of each slot's holder, as whoever keeps things by slot believes
    for _ in range(data.draw(st.integers(1, 30))):
        action = data.draw(st.sampled_from(["launch", "collect", "go", "come"]))
        if action == "launch" and len(flights) < 2:
            mine = data.draw(st.lists(st.sampled_from(alive), unique_by=id, min_size=1, max_size=rows))
            given_slots, fresh = slots.assign(mine)
            assert DUMMY not in given_slots and len(set(given_slots)) == len(mine)
            flying = dict(pair for flight in flights for pair in zip(*flight, strict=True))
            for slot, holder in fresh:
                assert slot not in flying
                number_of[slot] = holder.number
            del fresh
            numbers = [holder.number for holder in mine]
            for slot, number in zip(given_slots, numbers, strict=True):
                assert number_of[slot] == number
                assert flying.get(slot, number) == number
            slots.begin(given_slots)
            flights.append((given_slots, numbers))
            mine = holder = None  # nobody keeps a request that leaves
        elif action == "collect" and flights:
            slots.end(flights.pop(0)[0])
        elif action == "go" and len(alive) > 1:
            alive.pop(data.draw(st.integers(0, len(alive) - 1)))
        elif action == "come" and len(alive) < 12:
            alive.append(Holder())


def test_the_dead_of_a_cycle_do_not_pass_their_slot_on():
    slots = Slots(2)
    a = Holder()
    a.me = a
    flight, fresh = slots.assign([a])
    [slot] = flight
    slots.begin(flight)
    del a, fresh
    gc.collect()
    others = [Holder()]
    assert slots.assign(others)[0] != [slot]
    with pytest.raises(ValueError, match="slot"):
        slots.assign([*others, Holder()])
    slots.end(flight)
    assert slot in slots.assign([*others, Holder()])[0]
