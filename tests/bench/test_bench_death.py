"""What counts as the pause of a stream whose engine was killed."""

import pytest

from bench.death import _pause, lines
from bench.stream import Outcome


def outcome(*arrivals, error=""):
    return Outcome(0, arrivals=list(arrivals), error=error)


def test_a_resumed_stream_paused_from_one_token_to_the_next():
    assert _pause(outcome(1.0, 1.1, 1.9, 2.0), None, killed=1.15) == pytest.approx(0.8)


def test_what_was_sent_again_paused_until_it_brought_something_new():
    again = outcome(1.5, 1.6, 1.7, 1.8)
    assert _pause(outcome(1.0, 1.1, error="error event"), again, killed=1.15) == pytest.approx(1.7 - 1.1)


def test_the_table_compares_round_by_round():
    row = {"struck": 8, "pause_max": 2.0, "others": 0.1, "all_done": 9.0}
    found = {
        name: row | {"pause": median, "rounds": [row | {"pause": p} for p in pauses]}
        for name, median, pauses in (("resumed", 1.0, [1.0, 2.0]), ("sent again", 4.0, [3.0, 8.0]))
    }
    assert lines(found)[-1].startswith("sent again over resumed: 3.5 ")
