"""Moving averages over the steps of an engine."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.engine.step_stats import StepStats


def test_step_time_is_an_exponential_average():
    stats = StepStats(0.0)
    assert stats.step_seconds == 0
    stats.step(0.5, 1, 0.5)
    assert stats.step_seconds == 0.5  # the first step sets the average
    stats.step(1.0, 1, 0.6)
    assert stats.step_seconds == pytest.approx(0.9 * 0.5 + 0.1 * 1.0)


@given(st.lists(st.floats(0.001, 10), min_size=1, max_size=50))
def test_the_average_lies_between_the_fastest_and_the_slowest_step(steps: list[float]):
    stats = StepStats(0.0)
    for seconds in steps:
        stats.step(seconds, 1, 0.0)
    assert min(steps) * (1 - 1e-9) <= stats.step_seconds <= max(steps) * (1 + 1e-9)


def test_tokens_per_second_are_those_of_the_last_full_second():
    stats = StepStats(100.0)
    stats.step(0.5, 30, 100.5)
    assert stats.tokens_per_second == 0  # the second is not over
    stats.step(0.7, 30, 101.2)
    assert stats.tokens_per_second == pytest.approx(60 / 1.2)
    stats.tick(101.9)
    assert stats.tokens_per_second == pytest.approx(60 / 1.2)
    stats.tick(103.2)
    assert stats.tokens_per_second == 0  # idle


def test_the_deadline_has_a_minimum_and_follows_slow_steps():
    stats = StepStats(0.0)
    assert stats.deadline() == 5
    stats.step(0.01, 1, 0.0)
    assert stats.deadline() == 5
    slow_stats = StepStats(0.0)
    slow_stats.step(2.0, 1, 2.0)
    assert slow_stats.deadline() == 20


def test_a_step_that_should_take_long_may_take_longer():
    """A long prefill after many short decodes, or the first step of an engine."""
    stats = StepStats(0.0)
    assert stats.deadline(expected=3.0) == 30
    stats.step(0.01, 1, 0.0)
    assert stats.deadline(expected=3.0) == 30
