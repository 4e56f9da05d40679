"""Equal engines compute the same limits from the step times of all of them; engines of another kind do not count."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from daemon.engine.cost import SharedCost, StepCost, StepLimits, StepTime, merge_times, pack_times, unpack_times
from daemon.ipc.messages import EngineFacts
from tests.control.factories import engine_facts

COST = StepCost(0.012, 0.75e-3, 3e-6)
SIZES = [(1, 8), (16, 128), (16, 8192), (64, 512), (256, 256)]
LIMITS = StepLimits(COST.knee, COST.ideal_tokens)


def measured(rng: random.Random, disturbed: float, runs: int = 5) -> list[StepTime]:
    """Return the times of an engine. Each run takes up to ten times as long with the probability `disturbed`."""
    times = []
    for tokens, kv in SIZES:
        time = StepTime(tokens, kv, float("inf"))
        for _ in range(runs):
            factor = rng.uniform(1, 10) if rng.random() < disturbed else rng.uniform(1.0, 1.03)
            time = time.run(COST.seconds(tokens, kv) * factor)
        times.append(time)
    return times


def published(times: list[StepTime], cost_group: str = "cpu") -> EngineFacts:
    return engine_facts(cost_group=cost_group, step_times=pack_times(times), knee=7, ideal_tokens=9)


def shared(times: list[list[StepTime]], i: int, ideal_tokens: int = 0) -> SharedCost:
    """Return what engine i computes."""
    cost = SharedCost("cpu", times[i], ideal_tokens)
    cost.update(published(other) for j, other in enumerate(times) if j != i)
    return cost


@given(st.integers(0, 10**6), st.integers(1, 6), st.sampled_from([0.0, 0.3, 0.8, 1.0]))
def test_all_engines_of_a_group_compute_the_same_limits(seed: int, engines: int, disturbed: float):
    rng = random.Random(seed)
    times = [measured(rng, disturbed) for _ in range(engines)]
    results = [shared(times, i) for i in range(engines)]
    assert len({(r.limits, r.trusted) for r in results}) == 1


@given(st.integers(0, 10**6))
def test_disturbed_runs_do_not_change_the_limits(seed: int):
    """Three runs of ten take up to ten times as long."""
    rng = random.Random(seed)
    knee, ideal_tokens = shared([measured(rng, 0.3), measured(rng, 0.3)], 0).limits
    assert abs(knee / LIMITS.knee - 1) < 0.1
    assert abs(ideal_tokens / LIMITS.ideal_tokens - 1) < 0.2


def test_times_that_no_second_run_confirms_set_no_limits():
    once = [StepTime(tokens, kv, COST.seconds(tokens, kv)) for tokens, kv in SIZES]
    alone = shared([once], 0)
    assert (alone.limits, alone.trusted) == (StepLimits(), False)
    other = [t._replace(fastest=t.fastest * 1.05) for t in once]
    assert shared([once, other], 0).trusted


def test_an_unconfirmed_time_is_left_out_and_the_others_count():
    times = measured(random.Random(1), 0.0)
    times[3] = StepTime(64, 512, 5.0)
    assert shared([times], 0).limits.knee in range(LIMITS.knee - 2, LIMITS.knee + 3)


def test_engines_of_another_group_do_not_count():
    times = measured(random.Random(2), 0.0)
    cost = SharedCost("cpu", times)
    assert cost.update([published([t._replace(fastest=1e-6, second=1e-6) for t in times], "H200")])
    assert cost.limits == shared([times], 0).limits


def test_an_engine_without_a_model_has_no_limits_but_the_operators():
    cost = SharedCost("stub", [], ideal_tokens=300)
    assert not cost.update([published([], "stub")])
    assert (cost.limits, cost.trusted) == (StepLimits(0, 300), True)


def test_the_operators_ideal_tokens_win():
    assert shared([measured(random.Random(3), 0.0)], 0, ideal_tokens=300).limits.ideal_tokens == 300


def test_times_are_fitted_again_only_when_one_changes():
    times = measured(random.Random(4), 0.0)
    cost = SharedCost("cpu", times)
    assert cost.update([])
    assert not cost.update([])
    other = published(measured(random.Random(5), 0.0))
    assert cost.update([other])
    assert not cost.update([other, engine_facts(cost_group="H200")])


@given(st.lists(st.floats(0.125, 8, width=32), min_size=2, max_size=8), st.data())
def test_merged_times_are_the_two_fastest_runs_of_all_engines(runs: list[float], data: st.DataObject):
    engines = [StepTime(1, 8, float("inf")) for _ in range(3)]
    for seconds in runs:
        i = data.draw(st.integers(0, 2))
        engines[i] = engines[i].run(seconds)
    assert merge_times(unpack_times(pack_times(engines))) == [StepTime(1, 8, *sorted(runs)[:2])]
