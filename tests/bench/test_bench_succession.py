"""What counts as the gap of a stream whose frontend has ended, and as the load while everything restarts."""

from __future__ import annotations

import pytest

from bench.stream import Outcome, Usage
from bench.succession import death_lines, itl, longest_gap, restart_lines


def outcome(*arrivals: float) -> Outcome:
    return Outcome(0, arrivals=list(arrivals), usage=Usage(completion_tokens=len(arrivals)))


def test_the_gap_is_the_longest_that_ends_after_the_end_of_the_frontend():
    assert longest_gap(outcome(1.0, 2.0, 2.1, 2.6, 2.7), since=2.05) == pytest.approx(0.5)
    assert longest_gap(outcome(1.0, 2.0, 2.1, 2.2), since=1.5) == pytest.approx(1.0)


def test_tokens_count_where_they_arrive():
    found = itl([outcome(1.0, 1.5, 2.0, 4.0), Outcome(1, error="HTTP 503")], 1.6, 5.0)
    assert found is not None
    assert [found["mean"], found["max"]] == pytest.approx([1.25, 2.0])
    assert itl([outcome(1.0)], 0.0, 5.0) is None


def test_the_tables_have_a_line_for_each_row():
    gaps = {"gap": 0.2, "least": 0.1, "most": 0.3, "rounds": [{"gap": 0.2, "most": 0.3}]}
    assert "killed                        1   0.200   0.100   0.300" in death_lines({"killed": gaps})
    load = {"p50": 0.008, "p99": 0.01, "max": 0.02}
    found = {"requests": 5, "failed": 0, "ratio_p50": 1.0, "ratio_p99": 1.5}
    lines = restart_lines(found | {"rounds": [{"seconds": 9.0, "quiet": load, "restart": load}]})
    assert lines[0].endswith("5 requests, 0 failed") and lines[-1].startswith("restart over quiet: 1.00 at p50, 1.50")
