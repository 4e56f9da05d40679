"""Admission: what one client's burst leaves for others and for urgent requests."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.api.admission import Admission, Holder, Shares
from daemon.api.generator import Overloaded, TooMany

ROOM = 64 << 20  # bytes of journal
SLOTS = 1 << 14
RESERVATION = 1000  # bytes of one request
BATCH, OTHER, THIRD, ANY = (Holder(name, urgent=False) for name in ("batch", "other", "third", ""))
URGENT = [holder._replace(urgent=True) for holder in (BATCH, OTHER, ANY)]


class Frontend:
    """Admits requests and keeps them."""

    def __init__(
        self, max_queued: int = 512, journal_bytes: int = ROOM, journal_slots: int = SLOTS, max_per_client: int = 0
    ) -> None:
        self.admission = Admission(max_queued, journal_bytes, journal_slots, max_per_client)
        self.num_held = 0

    def send(self, holder: Holder, choices: int = 1, reservation: int = RESERVATION) -> bool:
        """Send one request; return True if it is admitted."""
        done = 0
        try:
            with self.admission.take(choices, holder) as places:
                for _ in range(choices):
                    self.admission.open(holder, reservation)
                    places.submitted()
                    done += 1
        except Overloaded:
            for _ in range(done):  # the answer ends, and cancels the choices that were submitted
                self.admission.end(holder)
                self.admission.free(holder, reservation)
            return False
        self.num_held += choices
        return True

    def flood(self, holder: Holder, choices: int = 1, reservation: int = RESERVATION) -> int:
        """Send requests until one is refused; return the number of choices that are kept."""
        before = self.num_held
        while self.send(holder, choices, reservation):
            assert self.num_held < 100_000
        return self.num_held - before


@pytest.mark.parametrize(
    ("max_queued", "choices"),
    [(1, 1), (2, 1), (4, 1), (8, 1), (11, 8), (64, 1), (64, 8), (512, 1), (512, 8), (10_000, 8)],
)
def test_a_flood_leaves_room_for_another_client_and_for_urgent_requests(max_queued: int, choices: int):
    frontend = Frontend(max_queued)
    taken = frontend.flood(BATCH, choices)
    assert taken > max_queued * 3 // 4 - choices
    assert taken <= max(1, max_queued * 3 // 4)
    if max_queued > 1:
        assert frontend.send(OTHER)
    assert not frontend.send(BATCH, choices)
    assert all(frontend.send(holder) for holder in URGENT[: max(1, max_queued // 8)])


def test_66_requests_with_8_choices_of_one_client_refuse_nothing_of_others():
    frontend = Frontend()
    admitted = [frontend.send(BATCH, 8) for _ in range(66)]
    assert admitted.count(True) == 48
    assert all(frontend.send(OTHER, 8) for _ in range(8))
    assert frontend.send(THIRD, 8)
    assert all(frontend.send(holder, 8) for holder in URGENT)


def test_clients_that_are_not_told_apart_share_all_places_but_the_reserve():
    frontend = Frontend()
    assert frontend.flood(ANY, 8) == 512
    assert not frontend.send(OTHER)
    assert frontend.flood(URGENT[2], 8) == 64
    assert not frontend.send(URGENT[1])


def test_a_client_gets_its_share_back_and_greedy_clients_become_equal():
    frontend = Frontend()
    held = {BATCH: frontend.flood(BATCH), OTHER: 0}
    for _ in range(2000):  # one of the larger client's requests ends, and both send again
        larger = max(held, key=held.__getitem__)
        frontend.admission.end(larger)
        frontend.admission.free(larger, RESERVATION)
        held[larger] -= 1
        for holder in (BATCH, OTHER):
            held[holder] += frontend.send(holder)
    assert held[BATCH] == pytest.approx(512 * 3 / 7, abs=2)
    assert held[OTHER] == pytest.approx(512 * 3 / 7, abs=2)


def test_a_request_that_could_never_be_admitted_is_told_so():
    frontend = Frontend(64)
    for holder, most in ((ANY, 64), (BATCH, 48), (URGENT[2], 72), (URGENT[0], 54)):
        with pytest.raises(TooMany, match=f"at most {most} choices here, this one has {most + 1}"):
            frontend.admission.take(most + 1, holder)
        with frontend.admission.take(most, holder):
            pass


@pytest.mark.parametrize("reservation", [2 << 20, 5 << 20])
def test_a_flood_of_large_requests_leaves_room_in_the_journal(reservation: int):
    frontend = Frontend()
    taken = frontend.flood(BATCH, reservation=reservation) * reservation
    assert ROOM // 2 < taken <= ROOM * 7 // 8 * 3 // 4
    assert frontend.send(OTHER, reservation=reservation)
    while frontend.send(ANY, reservation=reservation):
        pass
    assert frontend.send(URGENT[1], reservation=reservation)


def test_an_empty_journal_takes_any_request_that_fits():
    frontend = Frontend()
    assert frontend.send(BATCH, reservation=ROOM)
    assert not frontend.send(OTHER, reservation=64)


def test_places_never_exceed_the_slots_of_the_journal():
    frontend = Frontend(512, journal_bytes=1 << 30, journal_slots=256)
    assert frontend.flood(ANY) + frontend.flood(URGENT[2]) <= 256
    assert frontend.num_held > 250


def test_a_request_counts_once_while_its_choices_are_submitted():
    frontend = Frontend(8)
    with frontend.admission.take(4, ANY) as places:
        for _ in range(2):
            frontend.admission.open(ANY, RESERVATION)
            places.submitted()
        assert frontend.flood(ANY) == 4
    assert frontend.flood(ANY) == 2


@given(
    st.integers(1, 200),
    st.lists(st.tuples(st.sampled_from([BATCH, OTHER, THIRD, ANY, *URGENT]), st.integers(1, 40)), max_size=60),
    st.randoms(use_true_random=False),
)
def test_shares_never_exceed_what_there_is_and_the_reserve_is_kept(capacity, amounts_by_holder, random):
    reserve = capacity // 8
    shares, held = Shares(capacity, reserve), []
    for holder, amount in amounts_by_holder:
        if held and random.random() < 0.4:
            shares.add(*held.pop(random.randrange(len(held))))
        if not shares.fits(holder, amount):
            continue
        was_empty = not held
        shares.add(holder, amount)
        held.append((holder, -amount))
        free = capacity - shares.used - (0 if holder.urgent else reserve)
        assert shares.used == -sum(amount for _, amount in held) <= capacity
        assert free >= 0 or was_empty
        if holder.client and not was_empty:
            assert shares.held(holder) <= max(3 * free, 1)
    for one in held:
        shares.add(*one)
    assert shares.used == 0


@given(
    st.sampled_from([BATCH, ANY, *URGENT]), st.integers(1, 6), st.integers(1 << 10, ROOM), st.sampled_from([-1, 0, 1])
)
def test_choices_are_refused_for_ever_if_even_an_empty_journal_cannot_hold_them(holder, choices, size, offset):
    limit = ROOM if holder.urgent else ROOM * 7 // 8
    edge = limit * (3 if holder.client else 4) // 4 // choices + offset
    for reservation in (size, min(edge, ROOM)):
        frontend = Frontend()
        try:
            frontend.admission.check_journal(choices, holder, choices * reservation)
        except TooMany as e:
            assert f"need {choices * reservation} bytes" in str(e)
            assert not frontend.send(holder, choices, reservation)
        else:
            assert frontend.send(holder, choices, reservation)


def test_a_client_has_no_more_requests_than_an_option_allows():
    frontend = Frontend(max_per_client=5)
    assert frontend.flood(BATCH, choices=2) == 4 and frontend.send(BATCH) and not frontend.send(URGENT[0])
    assert frontend.flood(OTHER) == 5
    with pytest.raises(TooMany, match="at most 5 choices"):
        frontend.send(THIRD, choices=6)
    assert frontend.flood(ANY) > 100  # clients that are not told apart have no such limit
