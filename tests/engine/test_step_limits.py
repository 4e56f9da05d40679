"""Equal engines publish the same limits; engines of another kind do not count."""

from hypothesis import given
from hypothesis import strategies as st

from daemon.engine.cost import StepLimits, median_limits
from daemon.ipc.messages import EngineFacts
from tests.control.factories import engine_facts

LIMITS = st.builds(StepLimits, st.integers(0, 500), st.integers(0, 5000))


def published(limits: StepLimits, cost_group: str = "cpu") -> EngineFacts:
    return engine_facts(
        cost_group=cost_group, measured_knee=limits.knee, measured_ideal_tokens=limits.ideal_tokens, knee=7
    )


@given(st.lists(LIMITS, min_size=1, max_size=8))
def test_all_engines_of_a_group_compute_the_same_limits(measured):
    computed = set()
    for i, own in enumerate(measured):
        others = [published(m) for j, m in enumerate(measured) if j != i]
        computed.add(median_limits(own, "cpu", others))
    assert len(computed) == 1
    assert computed.pop().knee in {m.knee for m in measured}


def test_engines_of_another_group_do_not_count():
    others = [published(StepLimits(400, 9), "H200")]
    assert median_limits(StepLimits(24, 400), "cpu", others) == StepLimits(24, 400)


def test_an_engine_without_a_limit_does_not_lower_the_limits_of_the_others():
    others = [published(StepLimits(20, 400)), published(StepLimits(30, 0))]
    assert median_limits(StepLimits(0, 0), "cpu", others) == StepLimits(30, 0)
    assert median_limits(StepLimits(20, 400), "cpu", [published(StepLimits(0, 0))]) == StepLimits(20, 400)
