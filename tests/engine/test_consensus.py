"""Equal engines agree on what they measured; others have no say."""

from hypothesis import given
from hypothesis import strategies as st

from daemon.engine.consensus import Measure, agree
from tests.control.factories import engine

MEASURES = st.builds(Measure, st.integers(0, 500), st.integers(0, 5000))


def published(measure: Measure, make: str = "cpu"):
    return engine(make=make, measured_knee=measure.knee, measured_ideal_tokens=measure.ideal_tokens, knee=7)


@given(st.lists(MEASURES, min_size=1, max_size=8))
def test_all_engines_of_a_make_come_to_the_same(measures):
    agreed = set()
    for i, own in enumerate(measures):
        others = [published(m) for j, m in enumerate(measures) if j != i]
        agreed.add(agree(own, "cpu", others))
    assert len(agreed) == 1
    assert agreed.pop().knee in {m.knee for m in measures}


def test_another_make_has_no_say():
    assert agree(Measure(24, 400), "cpu", [published(Measure(400, 9), "H200")]) == Measure(24, 400)


def test_one_that_found_no_limit_does_not_pull_the_others_down():
    assert agree(Measure(0, 0), "cpu", [published(Measure(20, 400)), published(Measure(30, 0))]) == Measure(30, 0)
    assert agree(Measure(20, 400), "cpu", [published(Measure(0, 0))]) == Measure(20, 400)
