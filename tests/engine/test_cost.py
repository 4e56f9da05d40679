"""The cost of a step: the fit, the knee and the headroom that follow from it, and the calibration steps."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.engine.calibrate import BUDGET, DEVICE_BUDGET, PATIENCE, calibrate
from daemon.engine.cost import Observation, SharedCost, StepCost, StepLimits, StepTime, fit, fit_times
from daemon.engine.runner import PoolSpec, StepPlan, StepResult

CPU = StepCost(base=0.012, per_token=0.75e-3, per_kv=3e-6)
SIZES = [(1, 8), (16, 128), (16, 4096), (64, 512), (256, 256)]


def observed(cost: StepCost, sizes: list[tuple[int, int]] = SIZES) -> list[Observation]:
    return [Observation(tokens, kv, cost.seconds(tokens, kv)) for tokens, kv in sizes]


# -- the fit -------------------------------------------------------------------------------------


@given(base=st.floats(1e-4, 1.0), token=st.floats(0.01, 1.0), kv=st.floats(0.0001, 0.01))
def test_the_cost_of_a_linear_engine_is_fitted_exactly(base: float, token: float, kv: float):
    cost = StepCost(base, base * token, base * kv)
    found = fit(observed(cost))
    assert (found.base, found.per_token, found.per_kv) == pytest.approx(
        (cost.base, cost.per_token, cost.per_kv), rel=1e-3
    )


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(1, 9000), st.floats(1e-4, 3.0)), max_size=12))
def test_no_cost_is_negative_for_any_observations(rows: list[tuple[int, int, float]]):
    cost = fit(Observation(*row) for row in rows)
    assert min(cost.base, cost.per_token, cost.per_kv) >= 0
    assert min(cost.knee, cost.ideal_tokens) >= 0
    assert (cost.ideal > 0) == bool(rows)


@given(st.lists(st.sampled_from(SIZES), max_size=20), st.floats(1.01, 50))
def test_a_disturbed_repeat_changes_nothing(disturbed: list[tuple[int, int]], factor: float):
    late = [Observation(tokens, kv, factor * CPU.seconds(tokens, kv)) for tokens, kv in disturbed]
    assert fit(late + observed(CPU)) == fit(observed(CPU) + late) == fit(observed(CPU))


def test_no_step_counts_as_slower_than_a_larger_one():
    """The delay of every run of one step shows in the time of a larger step."""
    delayed = [o._replace(seconds=o.seconds * 8) if o.tokens == 1 else o for o in observed(CPU)]
    assert fit(observed(CPU) + delayed) == fit(observed(CPU))
    first = fit(delayed).ideal
    assert first < 8 * CPU.ideal / 2


def test_constant_steps_have_no_limit():
    """A rise below a twentieth counts as constant."""
    for rise in (0.0, 0.01):
        times = [0.01 * (1 + rise * i) for i in range(len(SIZES))]
        cost = fit(Observation(*size, seconds) for size, seconds in zip(SIZES, times, strict=True))
        assert (cost.knee, cost.ideal_tokens) == (0, 0)
        assert cost.ideal == pytest.approx(0.01, rel=0.05)


def test_observations_that_do_not_separate_the_terms_give_only_base():
    assert fit([Observation(1, 8, 0.02)]) == StepCost(pytest.approx(0.02))
    assert fit([]) == StepCost()


# -- knee and headroom -----------------------------------------------------------------------------


def test_at_the_knee_a_step_takes_twice_its_ideal_time():
    assert CPU.knee == 18
    assert CPU.seconds(CPU.knee, 0) == pytest.approx(2 * CPU.seconds(1, 0))


def test_up_to_ideal_tokens_a_decode_step_takes_at_most_a_fifth_more():
    assert CPU.ideal_tokens == pytest.approx(850, abs=1)
    assert CPU.seconds(1, CPU.ideal_tokens) <= 1.2 * CPU.ideal < CPU.seconds(1, CPU.ideal_tokens + 2)


@given(st.floats(1e-4, 1.0), st.floats(1e-6, 1e-2), st.floats(1e-3, 2.0))
def test_tokens_within_a_time_is_the_maximum(base: float, per_token: float, seconds: float):
    cost = StepCost(base, per_token)
    tokens = cost.tokens_within(seconds)
    assert tokens == 1 or cost.seconds(tokens, 0) <= seconds * (1 + 1e-9)
    assert cost.seconds(tokens + 1, 0) > seconds * (1 - 1e-9)


def test_steps_of_constant_time_have_no_limit():
    assert StepCost(0.01).tokens_within(0.001) == 0


# -- calibration ---------------------------------------------------------------------------------


class TimedRunner:
    """A runner whose steps take exactly the time of a `StepCost`, by its own clock; it records the plans."""

    eos_token_ids: tuple[int, ...] = ()
    vocab_size = 100

    def __init__(self, cost: StepCost, *, first_run: float = 1.0, max_model_len: int = 4096) -> None:
        self.max_model_len = max_model_len
        self.now = 0.0
        self.plans: list[StepPlan] = []
        self._cost = cost
        self._first_run = first_run  # factor on the first step of a shape

    def pool_spec(self, num_blocks: int) -> PoolSpec:
        raise NotImplementedError

    def load(self, pool: memoryview) -> None:
        raise NotImplementedError

    def execute(self, plan: StepPlan) -> StepResult:
        kv = sum(row.start + row.count for row in plan.rows)
        self.now += self._cost.seconds(plan.num_tokens, kv) * (1.0 if plan in self.plans else self._first_run)
        self.plans.append(plan)
        return StepResult([0] * len(plan.rows))

    def measure(self, budget: float = BUDGET, **limits: int) -> list[StepTime]:
        usual = {"num_blocks": 1000, "block_size": 16, "max_num_seqs": 64, "max_batch_tokens": 256}
        return calibrate(self, **(usual | limits), budget=budget, clock=lambda: self.now)

    def calibrate(self, budget: float = BUDGET, **limits: int) -> StepCost:
        return fit_times(self.measure(budget, **limits))


limits = st.fixed_dictionaries({
    "num_blocks": st.integers(2, 300), "block_size": st.sampled_from([8, 16, 128]),
    "max_num_seqs": st.integers(1, 300), "max_batch_tokens": st.integers(1, 3000),
})  # fmt: skip


@given(limits, st.integers(1, 600), st.sampled_from([1e-5, 1e-3, 0.1]))
def test_every_plan_respects_the_limits_of_a_scheduler(limits: dict[str, int], longest: int, base: float):
    """And each plan writes only the dummy block, so that it destroys no KV."""
    runner = TimedRunner(StepCost(base, base / 50, base / 9000), max_model_len=longest)
    runner.calibrate(**limits)
    assert runner.plans
    size = limits["block_size"]
    for plan in runner.plans:
        assert plan.num_tokens <= limits["max_batch_tokens"]
        assert len(plan.rows) <= limits["max_num_seqs"]
        assert all(row.count == 1 for row in plan.rows[: plan.num_decodes])
        for row in plan.rows:
            request, start, end = row.request, row.start, row.start + row.count
            assert end == len(request.tokens) <= longest
            assert len(request.block_table) == -(-end // size) < limits["num_blocks"] + 1
            assert all(0 <= block < limits["num_blocks"] for block in request.block_table)
            assert not any(request.block_table[start // size :])


@pytest.mark.parametrize("base", [0.0005, 0.002, 0.012, 0.3])
def test_calibration_finds_the_cost_within_its_budget(base: float):
    cost = StepCost(base, base / 16, base / 4000)
    runner = TimedRunner(cost)
    found = runner.calibrate()
    assert found.knee == pytest.approx(cost.knee, abs=1)
    assert found.ideal_tokens == pytest.approx(cost.ideal_tokens, rel=0.01)
    largest = cost.seconds(256, 256)
    indispensable = cost.seconds(1, 8) + cost.seconds(16, 128) + cost.seconds(16, 8192)
    assert runner.now <= max(BUDGET + largest, 2 * indispensable + 1e-9)  # the second round confirms the first


class RooflineCost(StepCost):
    """A GPU's steps: up to some hundred tokens they wait for the weights; above that they are bound by compute."""

    def seconds(self, tokens: int, kv: int) -> float:
        return max(0.005, 21e-6 * tokens) + 4e-8 * kv


def test_on_a_gpu_the_large_steps_determine_the_tokens_within_a_time():
    gpu = RooflineCost()
    found = TimedRunner(gpu, first_run=1.5).calibrate(max_num_seqs=256, max_batch_tokens=8192, budget=DEVICE_BUDGET)
    assert gpu.seconds(found.tokens_within(0.05), 0) == pytest.approx(0.05, rel=0.2)
    hasty = TimedRunner(gpu, first_run=1.5).calibrate(max_num_seqs=256, max_batch_tokens=8192)
    assert gpu.seconds(hasty.tokens_within(0.05), 0) > 0.075  # the reason for the larger budget


def test_a_slow_first_run_does_not_count():
    assert TimedRunner(CPU, first_run=1.5).calibrate().knee == pytest.approx(CPU.knee, abs=1)


class DisturbedRunner(TimedRunner):
    """A runner beside other work: a `share` of its steps takes up to `extra` times their time on top."""

    def __init__(self, cost: StepCost, seed: int, *, share: float = 0.5, extra: float = 2.0) -> None:
        super().__init__(cost)
        self._rng = random.Random(seed)
        self._share, self._extra = share, extra

    def execute(self, plan: StepPlan) -> StepResult:
        began = self.now
        result = super().execute(plan)
        if self._rng.random() < self._share:
            self.now += (self.now - began) * self._rng.uniform(0.0, self._extra)
        return result


@pytest.mark.parametrize("seed", range(20))
def test_two_equal_engines_on_a_bursty_machine_find_the_cost(seed: int):
    runners = (DisturbedRunner(CPU, 2 * seed + i, share=0.3, extra=9.0) for i in (0, 1))
    first, second = (runner.measure() for runner in runners)
    merged = SharedCost("cpu", [*first, *second])
    merged.update(())
    if merged.trusted:
        assert merged.limits.knee == pytest.approx(CPU.knee, rel=0.15)
        assert merged.limits.ideal_tokens == pytest.approx(CPU.ideal_tokens, rel=0.3)
    else:
        assert merged.limits == StepLimits()


def test_a_disturbed_engine_measures_longer_and_still_finds_its_cost():
    largest = CPU.seconds(256, 256) * 3
    found = [(runner.calibrate(), runner.now) for runner in (DisturbedRunner(CPU, seed) for seed in range(40))]
    assert all(now <= PATIENCE * BUDGET + largest for _, now in found)
    near = [
        cost
        for cost, _ in found
        if cost.knee == pytest.approx(CPU.knee, rel=0.25)
        and cost.ideal_tokens == pytest.approx(CPU.ideal_tokens, rel=0.5)
    ]
    assert len(near) >= 32
