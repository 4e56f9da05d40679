"""The numbers a benchmark reports, against plain definitions of them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.measures import Objectives, distribution, ratios, summary, token_itl, weighted_distribution
from bench.prompts import arrival_times, token_prompts, word_prompts
from bench.stream import Outcome, Usage


def outcome(arrivals, tokens, **more) -> Outcome:
    return Outcome(
        0, arrivals=arrivals, ended=arrivals[-1], usage=Usage(10, tokens), finish="length", **{"sent": 0.0, **more}
    )


def test_percentiles_interpolate():
    d = distribution([4.0, 1.0, 2.0, 3.0, 5.0])
    assert d == pytest.approx({"mean": 3.0, "p50": 3.0, "p90": 4.6, "p99": 4.96, "max": 5.0})
    assert distribution([]) is None


@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(1, 5)), min_size=1))
def test_a_weight_stands_for_that_many_equal_values(pairs):
    values, weights = zip(*pairs, strict=True)
    plain = np.repeat(np.array(values, float), weights)
    d = weighted_distribution(values, weights)
    assert d["mean"] == pytest.approx(plain.mean())
    assert d["max"] == plain.max()
    for p in (50, 90, 99):
        assert d[f"p{p}"] == np.percentile(plain, p, method="inverted_cdf")


def test_a_gap_is_shared_by_the_tokens_that_ended_it():
    d = token_itl([outcome([1.0, 4.0, 5.0], 5, reported=[1, 4, 5])])
    assert (d["p50"], d["max"]) == (1.0, 1.0)
    assert token_itl([outcome([1.0, 4.0], 1, reported=[1, 1])]) is None


def test_summary_counts_good_requests_only_in_throughput_and_all_in_failures():
    runs = [outcome([1.0, 2.0, 3.0], 3), outcome([2.0, 4.0], 2), Outcome(2, error="HTTP 429", ended=1.0)]
    s = summary(runs, seconds=5.0, cpu_seconds=0.1, objectives=Objectives(ttft=1.5))
    assert (s["requests"], s["failed"], s["errors"]) == (3, 1, {"HTTP 429": 1})
    assert (s["output_tokens_per_second"], s["prompt_tokens"], s["tokens_from"]) == (1.0, 20, "usage")
    assert (s["goodput"], s["objectives_met"]) == pytest.approx((1 / 5, 1 / 3))
    assert s["ttft"]["max"] == 2.0 and s["itl"]["p50"] == 1.0 and s["finish"] == {"length": 2}


def test_objectives_hold_all_together():
    good = outcome([0.5, 1.0, 1.5], 3)
    assert Objectives(ttft=0.5, tpot=0.5, e2e=1.5).met(good)
    assert not Objectives(ttft=0.4).met(good)
    assert not Objectives(ttft=0.5, e2e=1.4).met(good)
    assert not Objectives(tpot=0.4).met(good)
    assert not Objectives(ttft=9.0).met(Outcome(0, arrivals=[0.1], error="timeout"))


def test_a_run_where_everything_failed_has_no_latencies():
    s = summary([Outcome(0, error="timeout", ended=1.0)], seconds=1.0, cpu_seconds=0.0, objectives=Objectives())
    assert s["ttft"] is None and s["itl_token"] is None and s["output_tokens_per_second"] == 0


def test_ratios_are_second_over_first_by_round():
    def run(rate, ttft):
        d = dict.fromkeys(("p50", "p99"), ttft)
        return {"output_tokens_per_second": rate, "ttft": d, "itl_token": None, "tpot": None, "e2e": d}

    r = ratios([run(10, 1.0), run(20, 1.0), run(10, 1.0)], [run(20, 2.0), run(20, 3.0), run(50, 4.0)])
    assert r["output_tokens_per_second"] == {"median": 2.0, "min": 1.0, "max": 5.0}
    assert r["ttft_p50"]["median"] == 3.0 and "tpot_p50" not in r


def test_prompts_are_distinct_repeatable_and_of_the_asked_length():
    made = word_prompts(50, 20, seed=3, shared_words=5)
    assert made == word_prompts(50, 20, seed=3, shared_words=5) != word_prompts(50, 20, seed=4, shared_words=5)
    assert {len(p.split()) for p in made} == {25}
    assert len({tuple(p.split()[:5]) for p in made}) == 1
    assert len({p.split()[5] for p in made}) == 50
    ids = token_prompts(3, 40, seed=0, ids=(100, 110), shared_tokens=2)
    assert [len(p) for p in ids] == [42] * 3 and set().union(*ids) <= set(range(100, 110))
    assert len({tuple(p) for p in ids}) == 3 and len({tuple(p[:2]) for p in ids}) == 1


@pytest.mark.parametrize(
    ("arrivals", "cv", "expected"), [("poisson", 9.0, 1.0), ("gamma", 0.5, 0.5), ("gamma", 3.0, 3.0)]
)
def test_arrivals_have_the_rate_and_the_burstiness_asked_for(arrivals, cv, expected):
    times = arrival_times(20_000, 4.0, arrivals=arrivals, cv=cv, seed=1)
    gaps = np.diff(times)
    assert times[0] == 0.0 and (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(0.25, rel=0.1)
    assert gaps.std() / gaps.mean() == pytest.approx(expected, rel=0.1)
