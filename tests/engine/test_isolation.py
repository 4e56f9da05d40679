"""A step that raises ends the requests that are the cause; the others get exactly their tokens."""

from __future__ import annotations

import pytest

from daemon.engine.fake.hash import HashRunner, expected_stream
from daemon.engine.pipeline import Pipeline
from daemon.engine.runner import StepPlan, StepResult
from daemon.engine.scheduler import Scheduler
from daemon.ipc.messages import Finish
from daemon.kvpool.block_manager import BlockManager
from tests.engine.scheduler_harness import make_request

VOCAB, BLOCK_SIZE, BLOCKS, OUTPUT = 500, 8, 60, 12


class FaultyRunner(HashRunner):
    """Raises for each step that contains a request of `guilty` at the output position `at` or a later one.

    `broken`: once it has raised, it raises for every step.
    """

    def __init__(self, guilty: set[int], at: int, *, broken: bool = False) -> None:
        super().__init__(VOCAB, 400, BLOCK_SIZE)
        self.load(memoryview(bytearray(self.pool_spec(BLOCKS).nbytes)))
        self._guilty, self._at, self._broken = guilty, at, broken
        self.raised = 0

    def launch(self, plan: StepPlan):
        if any(row.request.rid in self._guilty and row.start + row.count >= self._at for row in plan.rows) or (
            self._broken and self.raised
        ):
            self.raised += 1
            raise ZeroDivisionError("division by zero")
        return super().launch(plan)


class PlainRunner:
    """The same without `launch`: a step is computed in `execute`."""

    def __init__(self, runner: FaultyRunner) -> None:
        self._runner = runner

    def execute(self, plan: StepPlan) -> StepResult:
        return self._runner.execute(plan)


def run(runner, scheduler: Scheduler) -> dict[int, tuple[list[int], Finish]]:
    """Run the worker's loop until no request is left. Return output and finish of each request."""
    pipeline = Pipeline(runner)
    streams: dict[int, tuple[list[int], Finish]] = {}
    while True:
        plan = None if pipeline.closed else scheduler.plan(0.0)
        if plan is not None:
            pipeline.launch(plan)
        step = pipeline.collect(leave=0 if plan is None else 1)
        if step is not None:
            for request, _, tokens, finish, *_ in scheduler.apply_result(step.plan, step.result, 0.0):
                streams[request.rid] = (streams.get(request.rid, ([], finish))[0] + tokens, finish)
        scheduler.check()
        if plan is None and step is None:
            return streams


def scheduler_of(*prompts: list[int]) -> Scheduler:
    scheduler = Scheduler(
        BlockManager(BLOCKS, BLOCK_SIZE), max_num_seqs=8, max_batch_tokens=48, max_model_len=400, eos_token_ids=()
    )
    for rid, prompt in enumerate(prompts):
        scheduler.add(make_request(rid, prompt, max_tokens=OUTPUT, seed=rid))
    return scheduler


PROMPTS = [[rid + 1] * length for rid, length in enumerate([5, 40, 9, 70, 17])]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("guilty", [{1}, {0, 4}, {3}])
@pytest.mark.parametrize("at", [0, 20, 45, 74])
def test_only_the_guilty_end_and_every_block_is_freed(overlap, guilty, at):
    faulty = FaultyRunner(guilty, at)
    scheduler = scheduler_of(*PROMPTS)
    streams = run(faulty if overlap else PlainRunner(faulty), scheduler)
    for rid, prompt in enumerate(PROMPTS):
        whole = expected_stream(prompt, rid, OUTPUT, VOCAB)
        tokens, finish = streams[rid]
        if rid in guilty and at < len(prompt) + OUTPUT:
            assert finish is Finish.ERROR
            assert tokens == whole[: len(tokens)]
        else:
            assert (tokens, finish) == (whole, Finish.LENGTH)
    assert scheduler.blocks.num_used == 0


@pytest.mark.parametrize("overlap", [False, True])
def test_a_runner_that_computes_nothing_any_more_ends_the_engine(overlap):
    """No request is to blame if a dummy row raises, too."""
    faulty = FaultyRunner({1}, 42, broken=True)
    scheduler = scheduler_of(*PROMPTS)
    with pytest.raises(ZeroDivisionError):
        run(faulty if overlap else PlainRunner(faulty), scheduler)


def test_a_fault_that_does_not_come_back_ends_no_request():
    """Such as a lack of memory: each row alone needs less."""

    class OnceFaulty(FaultyRunner):
        def launch(self, plan: StepPlan):
            if not self.raised and len(plan.rows) > 2:
                self.raised += 1
                raise MemoryError
            return HashRunner.launch(self, plan)

    runner = OnceFaulty(set(), 0)
    streams = run(runner, scheduler_of(*PROMPTS))
    assert runner.raised == 1
    assert streams == {i: (expected_stream(p, i, OUTPUT, VOCAB), Finish.LENGTH) for i, p in enumerate(PROMPTS)}


def test_each_row_that_is_computed_alone_begins_with_a_sign_of_life():
    beats = []
    scheduler = scheduler_of(*PROMPTS)
    runner = FaultyRunner(guilty={1}, at=0)
    pipeline = Pipeline(runner, beat=lambda: beats.append(runner.raised))
    plan = scheduler.plan(0.0)
    pipeline.launch(plan)
    assert not beats
    pipeline.collect()
    assert len(beats) == len(plan.rows) + 1  # and one before the dummy row
