from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.engine.step_stats import StepStats


def test_step_time_is_an_exponential_average():
    pace = StepStats(0.0)
    assert pace.step_seconds == 0
    pace.step(0.5, 1, 0.5)
    assert pace.step_seconds == 0.5  # the first step is all there is to go by
    pace.step(1.0, 1, 0.6)
    assert pace.step_seconds == pytest.approx(0.9 * 0.5 + 0.1 * 1.0)


@given(st.lists(st.floats(0.001, 10), min_size=1, max_size=50))
def test_average_lies_among_the_steps(steps: list[float]):
    pace = StepStats(0.0)
    for seconds in steps:
        pace.step(seconds, 1, 0.0)
    assert min(steps) * (1 - 1e-9) <= pace.step_seconds <= max(steps) * (1 + 1e-9)


def test_tokens_a_second_are_those_of_the_last_full_second():
    pace = StepStats(100.0)
    pace.step(0.5, 30, 100.5)
    assert pace.tokens_per_second == 0  # the second is not over
    pace.step(0.7, 30, 101.2)
    assert pace.tokens_per_second == pytest.approx(60 / 1.2)
    pace.tick(101.9)
    assert pace.tokens_per_second == pytest.approx(60 / 1.2)
    pace.tick(103.2)
    assert pace.tokens_per_second == 0  # idle


def test_deadline_has_a_floor_and_follows_slow_steps():
    pace = StepStats(0.0)
    assert pace.step_deadline == 10
    pace.step(0.01, 1, 0.0)
    assert pace.step_deadline == 10
    slow = StepStats(0.0)
    slow.step(2.0, 1, 2.0)
    assert slow.step_deadline == 100
