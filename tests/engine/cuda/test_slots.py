"""Slots under any order of steps: no two requests share one, and none is reassigned while a step in flight uses
it."""

import gc
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.engine.cuda.slots import DUMMY, Slots


class Holder:
    """Replaces a request. Tests identify it by its number, so that they need not keep it alive."""

    _numbers = count()
    me: object = None  # makes a reference cycle

    def __init__(self):
        self.number = next(self._numbers)


def test_a_request_keeps_its_slot():
    slots = Slots(4)
    a, b = Holder(), Holder()
    first, fresh = slots.assign([a, b])
    assert fresh == [(first[0], a), (first[1], b)]
    assert slots.assign([b, a]) == ([first[1], first[0]], [])


def test_the_slot_of_a_collected_request_is_used_again():
    slots = Slots(1)
    a = Holder()
    [slot], fresh = slots.assign([a])
    del a, fresh
    assert slots.assign([Holder()])[0] == [slot]


def test_a_slot_that_was_taken_back_is_new_again():
    slots = Slots(2)
    a, b = Holder(), Holder()
    [kept], _ = slots.assign([a])
    (_, taken), fresh = slots.assign([a, b])
    slots.take_back(fresh)
    assert slots.assign([b, a]) == ([taken, kept], [(taken, b)])


def test_more_requests_than_slots_are_rejected():
    slots = Slots(3)
    a, b = [Holder(), Holder()], [Holder(), Holder()]
    mine, _ = slots.assign(a)
    slots.begin(mine)
    with pytest.raises(ValueError, match="slot"):
        slots.assign(b)
    slots.end(mine)
    assert len(set(slots.assign(b)[0])) == 2


def test_a_request_that_lost_its_slot_comes_back_as_new():
    slots = Slots(1)
    a, b = Holder(), Holder()
    slots.assign([a])
    assert slots.assign([b])[1]
    assert slots.assign([a])[1]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_order_of_events(data):
    """Eight slots. At most two steps of at most four rows are in flight; requests arrive, pause and leave."""
    rows, slots = 4, Slots(8)
    alive = [Holder() for _ in range(6)]
    steps = []
    number_of = {}  # of each slot's holder, as a user of per-slot data knows it
    for _ in range(data.draw(st.integers(1, 30))):
        action = data.draw(st.sampled_from(["launch", "collect", "leave", "arrive"]))
        if action == "launch" and len(steps) < 2:
            mine = data.draw(st.lists(st.sampled_from(alive), unique_by=id, min_size=1, max_size=rows))
            given_slots, fresh = slots.assign(mine)
            assert DUMMY not in given_slots and len(set(given_slots)) == len(mine)
            slots_in_use = dict(pair for step in steps for pair in zip(*step, strict=True))
            for slot, holder in fresh:
                assert slot not in slots_in_use
                number_of[slot] = holder.number
            del fresh
            numbers = [holder.number for holder in mine]
            for slot, number in zip(given_slots, numbers, strict=True):
                assert number_of[slot] == number
                assert slots_in_use.get(slot, number) == number
            slots.begin(given_slots)
            steps.append((given_slots, numbers))
            mine = holder = None  # drop the references to requests that may leave
        elif action == "collect" and steps:
            slots.end(steps.pop(0)[0])
        elif action == "leave" and len(alive) > 1:
            alive.pop(data.draw(st.integers(0, len(alive) - 1)))
        elif action == "arrive" and len(alive) < 12:
            alive.append(Holder())


def test_a_slot_in_flight_is_not_reused_when_its_request_dies_in_a_cycle():
    slots = Slots(2)
    a = Holder()
    a.me = a
    in_flight, fresh = slots.assign([a])
    [slot] = in_flight
    slots.begin(in_flight)
    del a, fresh
    gc.collect()
    others = [Holder()]
    assert slots.assign(others)[0] != [slot]
    with pytest.raises(ValueError, match="slot"):
        slots.assign([*others, Holder()])
    slots.end(in_flight)
    assert slot in slots.assign([*others, Holder()])[0]
