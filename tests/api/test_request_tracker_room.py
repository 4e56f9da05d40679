"""RequestTracker and the room in the journal for all choices of a request."""

from __future__ import annotations

import pytest

from daemon.api.generator import Overloaded, RequestAttributes, TooMany
from daemon.api.request_state import RequestState
from daemon.ipc.messages import SamplingParams
from tests.api.test_request_tracker import Harness, handles, with_harness

__all__ = ["handles"]  # a fixture


@with_harness
async def test_room_is_refused_for_ever_exactly_if_an_empty_journal_has_none(harness: Harness) -> None:
    harness.start_engine(0, 1)
    tracker = harness.tracker
    attributes = RequestAttributes("cmpl-1-0", cache_salt=b"s", client="me", x_request_id="x" * 40)
    fitted = set()
    for max_tokens in range(1300, 1700):  # three choices of a journal of 1 MiB
        params = SamplingParams(max_tokens, 2**63, logprobs=20, logit_bias=((7, 1.0),))
        started: list[RequestState] = []
        try:
            for i in range(3):
                started.append(tracker.submit([1, 2, 3], params, attributes._replace(label=f"cmpl-1-{i}")))
        except Overloaded:
            pass
        fits = len(started) == 3
        for request in started:
            request.release()
        fitted.add(fits)
        if fits:
            tracker.check_room([(3, max_tokens)] * 3, params, attributes)
        else:
            with pytest.raises(TooMany, match="3 choices of this request need"):
                tracker.check_room([(3, max_tokens)] * 3, params, attributes)
        tracker.check_room([(3, max_tokens)], params, attributes)
    assert fitted == {True, False}


@with_harness
async def test_streams_that_have_ended_make_room_one_by_one(harness: Harness) -> None:
    harness.start_engine(0, 1)
    tracker, params, attributes = harness.tracker, SamplingParams(20_000, 1), RequestAttributes("x")
    kept: list[RequestState] = []
    with pytest.raises(Overloaded):
        for _ in range(100):
            kept.append(tracker.submit([1], params, attributes))
            kept[-1].cancel()  # it has ended, and its slot stays
    held = len(kept)
    assert held > 5

    def make_room(holder: object) -> bool:
        if not kept:
            return False
        kept.pop(0).release()
        return True

    tracker.store.make_room = make_room
    tracker.submit([1], params, attributes)
    assert held - 2 <= len(kept) < held
    tracker.submit([1], SamplingParams(60_000, 1), attributes)
    with pytest.raises(Overloaded):
        for _ in range(100):
            tracker.submit([1], params, attributes)
    assert not kept
