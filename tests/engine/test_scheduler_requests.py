"""Prefixes, the end of requests, cancels, epochs and steps in flight of the scheduler."""

import subprocess
import sys

import pytest

from daemon.engine.migration.llumlet import Llumlet
from daemon.engine.runner import NO_TOKEN, StepResult
from daemon.engine.scheduler import fcfs
from daemon.ipc.messages import Finish, RequestParams, TokenLogprobs
from daemon.kvpool.block_manager import PoolError
from tests.engine.migration.harness import owned
from tests.engine.scheduler_harness import EOS, SIZE, add, make_request, make_scheduler, rids, run_step

# -- prefixes ----------------------------------------------------------------------------------


def test_a_computed_prefix_is_shared_and_one_token_is_left_to_compute():
    scheduler = make_scheduler()
    prompt = list(range(50, 50 + 3 * SIZE))
    add(scheduler, make_request(1, prompt))
    run_step(scheduler)
    first, second = make_request(2, prompt), make_request(3, [*prompt, 1])
    add(scheduler, first, second)
    assert run_step(scheduler)[0] == [(1, 12, 1), (3, 12, 1), (2, 8, 4)]
    assert (first.num_cached, second.num_cached) == (8, 12)
    assert first.block_table[:2] == scheduler.running[1].block_table[:2]
    assert (scheduler.prefix_query_tokens, scheduler.prefix_hit_tokens) == (12 + 12 + 13, 20)


def test_num_cached_counts_prompt_tokens_at_the_first_admission_only():
    scheduler = make_scheduler()
    prompt = list(range(50, 56))
    add(scheduler, make_request(1, prompt, output=[8] * 10))
    run_step(scheduler)
    again = make_request(2, prompt, output=[8] * 10)
    add(scheduler, again)
    run_step(scheduler)
    assert again.num_cached == 6
    assert (scheduler.prefix_query_tokens, scheduler.prefix_hit_tokens) == (12, 6)
    first = scheduler.running[1]
    scheduler.preempt(first, 0.0)
    run_step(scheduler)
    assert first.num_computed == 18 and first.num_cached == 0
    assert (scheduler.prefix_query_tokens, scheduler.prefix_hit_tokens) == (12, 6)


def test_requests_with_different_salts_share_no_prefix():
    scheduler = make_scheduler()
    other = make_request(2, [5] * 9)
    other.params = RequestParams(other.sampling, 2.0, cache_salt=b"tenant")
    add(scheduler, make_request(1, [5] * 9))
    run_step(scheduler)
    add(scheduler, other)
    run_step(scheduler)
    assert other.num_cached == 0


# -- the end of a request ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling, token, finishes_at, finish",
    [
        ({"max_tokens": 3}, 9, 3, Finish.LENGTH),
        ({}, EOS, 1, Finish.STOP),
        ({"max_tokens": 4, "ignore_eos": True}, EOS, 4, Finish.LENGTH),
        ({"min_tokens": 3}, EOS, 3, Finish.STOP),
        ({"stop_token_ids": (7,)}, 7, 1, Finish.STOP),
        ({"stop_token_ids": (7,), "min_tokens": 2, "ignore_eos": True}, 7, 2, Finish.STOP),
        ({"max_tokens": 1}, EOS, 1, Finish.STOP),
        ({}, 9, 16, Finish.LENGTH),  # max_model_len
    ],
)
def test_a_request_ends(sampling, token, finishes_at, finish):
    scheduler = make_scheduler(max_len=20)
    r = make_request(1, 4, **sampling)
    add(scheduler, r)
    emissions = [run_step(scheduler, token)[2][0] for _ in range(finishes_at)]
    assert [e.start for e in emissions] == list(range(finishes_at))
    assert [e.finish for e in emissions] == [Finish.NONE] * (finishes_at - 1) + [finish]
    assert r.finish is finish and scheduler.blocks.num_used == 0 and scheduler.get(1) is None


def test_a_resumed_request_continues_after_its_output():
    scheduler = make_scheduler()
    add(scheduler, make_request(1, 5, output=[8, 8, 8], max_tokens=5))
    rows, _, [emission] = run_step(scheduler)
    assert rows == [(1, 0, 8)] and emission.start == 3
    assert run_step(scheduler)[2][0].finish is Finish.LENGTH


def test_logprobs_follow_their_rows():
    scheduler = make_scheduler(tokens=6)
    add(scheduler, make_request(1, 2), make_request(2, 2), make_request(3, 5))
    plan = scheduler.plan(0.0)
    lp = TokenLogprobs(-0.5, [9], [-0.5])
    first, second = scheduler.apply_result(plan, StepResult([8, 9], [None, lp]), 0.0)
    assert (first.tokens, first.logprobs, second.tokens, second.logprobs) == ([8], None, [9], [lp])


# -- requests come and go ----------------------------------------------------------------------


def test_only_a_newer_epoch_replaces_an_older_one():
    scheduler = make_scheduler()
    old, new = make_request(1, epoch=3), make_request(1, epoch=5, output=[8])
    add(scheduler, old)
    assert not scheduler.add(make_request(1, epoch=3)) and not scheduler.add(make_request(1, epoch=2))
    run_step(scheduler)
    add(scheduler, new)
    assert scheduler.get(1) is new and old.finish is Finish.CANCELLED
    assert not scheduler.cancel(1, 4) and scheduler.cancel(1, 5) and not scheduler.cancel(1, 5)
    assert scheduler.plan(0.0) is None and scheduler.waiting_tokens == 0


def test_rows_of_requests_cancelled_or_preempted_during_the_step_emit_nothing():
    scheduler = make_scheduler()
    add(scheduler, *(make_request(i) for i in range(1, 5)))
    plan = scheduler.plan(0.0)
    scheduler.cancel(1, 1)
    scheduler.preempt(scheduler.running[2], 0.0)
    add(scheduler, make_request(3, epoch=2))
    emissions = scheduler.apply_result(plan, StepResult([11, 12, 13, 14]), 0.0)
    assert [(e.request.rid, e.tokens) for e in emissions] == [(4, [14])]
    scheduler.check()


def test_a_row_of_an_older_epoch_does_not_count_for_the_newer_one():
    scheduler = make_scheduler()
    add(scheduler, make_request(1))
    old_plan = scheduler.plan(0.0)
    add(scheduler, make_request(1, epoch=2, output=[8]))
    plan = scheduler.plan(1.0)
    assert scheduler.apply_result(old_plan, StepResult([11]), 2.0) == []
    assert [e.start for e in scheduler.apply_result(plan, StepResult([12]), 2.0)] == [1]


def test_requests_that_owned_requests_omits_are_cancelled():
    scheduler = make_scheduler(seqs=3)
    add(scheduler, *(make_request(i, frontend=i % 2) for i in range(6)), make_request(6, epoch=2))
    run_step(scheduler)
    present = [*scheduler.running.values(), *scheduler.waiting]
    Llumlet(scheduler, journals=None).on_owned_requests(0, owned({0: 1, 2: 2, 6: 2}), 0.0)  # it reads no journal
    assert sorted(r.rid for r in present if r.finish is Finish.CANCELLED) == [2, 4]
    assert rids(scheduler) == ([0, 1], [3, 5, 6])
    scheduler.check()


def test_a_request_that_can_never_run_is_refused():
    scheduler = make_scheduler(blocks=5, max_len=30)
    assert "KV memory holds 20" in scheduler.refuse(make_request(1, 20))
    assert "model takes 30" in scheduler.refuse(make_request(1, 30))
    assert "empty" in scheduler.refuse(make_request(1, 0))
    assert scheduler.refuse(make_request(1, 19)) is None
    with pytest.raises(ValueError, match="KV memory"):
        scheduler.add(make_request(1, 20))


def test_check_finds_a_lost_table_and_a_request_in_two_places():
    scheduler = make_scheduler()
    add(scheduler, make_request(1), make_request(2))
    run_step(scheduler)
    scheduler.waiting.push(scheduler.running[1], (0, 0.0, 1))
    with pytest.raises(PoolError, match="request 1 both waits and runs"):
        scheduler.check()
    scheduler.waiting.remove(scheduler.running[1])
    del scheduler.running[2]
    with pytest.raises(PoolError, match="0 tables hold it"):
        scheduler.check()


def test_the_fcfs_key_is_the_arrival():
    assert fcfs(make_request(1, arrival=5.0), 99.0) == 5.0


@pytest.mark.parametrize(
    "module",
    ["daemon.kvpool.block_manager", "daemon.engine.scheduler", "daemon.engine.request", "daemon.ipc.messages"],
)
def test_pure_modules_import_no_numeric_packages(module):
    code = f"import sys, {module}; print(sorted({{'torch', 'numpy', 'numba'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_request_for_which_no_token_can_be_sampled_ends_alone():
    scheduler = make_scheduler()
    add(scheduler, make_request(1), make_request(2))
    lost, other = scheduler.apply_result(scheduler.plan(0.0), StepResult([NO_TOKEN, 9]), 0.0)
    scheduler.check()
    assert (lost.request.rid, lost.tokens, lost.finish) == (1, [], Finish.ERROR)
    assert (other.request.rid, other.tokens, other.finish) == (2, [9], Finish.NONE)
    assert rids(scheduler) == ([2], [])


# -- steps in flight -------------------------------------------------------------------------------


def test_the_next_step_computes_the_token_that_the_step_in_flight_samples():
    scheduler = make_scheduler()
    add(scheduler, r := make_request(1, prompt=4))
    first = scheduler.plan(0.0)
    second = scheduler.plan(0.0)
    assert [(row.start, row.count, row.sample) for row in second.rows] == [(4, 1, True)]
    assert second.rows[0].start == len(r.tokens) and second.num_decodes == 1
    scheduler.apply_result(first, StepResult([9]), 0.0)
    assert (r.num_computed, r.num_inflight_tokens, r.num_sampling) == (4, 1, True)
    scheduler.apply_result(second, StepResult([8]), 0.0)
    assert r.tokens[4:] == [9, 8] and not r.in_flight and not r.num_sampling


def test_nothing_is_computed_past_the_last_token():
    scheduler = make_scheduler()
    add(scheduler, make_request(1, max_tokens=1))
    plan = scheduler.plan(0.0)
    assert scheduler.plan(0.0) is None
    assert scheduler.apply_result(plan, StepResult([9]), 0.0)[0].finish == Finish.LENGTH


def test_a_row_planned_before_a_preemption_is_void_even_if_the_request_runs_again():
    scheduler = make_scheduler()
    add(scheduler, r := make_request(1, prompt=4))
    first = scheduler.plan(0.0)
    scheduler.preempt(r, 0.0)
    second = scheduler.plan(0.0)
    assert scheduler.apply_result(first, StepResult([9]), 0.0) == []
    assert scheduler.apply_result(second, StepResult([7]), 0.0)[0].tokens == [7]


def test_a_peer_gets_no_block_that_a_step_in_flight_still_writes():
    scheduler = make_scheduler(blocks=4)
    add(scheduler, make_request(1, prompt=4))
    plan = scheduler.plan(0.0)
    written = list(scheduler.running[1].block_table)
    assert scheduler.cancel(1, 1) and scheduler.num_unsettled == len(written) > 0
    free = scheduler.blocks.num_free - len(written)
    assert not set(scheduler.allocate_settled(free)) & set(written)
    with pytest.raises(PoolError):
        scheduler.allocate_settled(1)
    scheduler.apply_result(plan, StepResult([9]), 0.0)
    assert set(scheduler.allocate_settled(1)) <= set(written)


def test_a_paused_request_is_left_out_until_it_is_unpaused():
    scheduler = make_scheduler()
    add(scheduler, r := make_request(1))
    run_step(scheduler)
    scheduler.pause(r)
    assert scheduler.plan(0.0) is None
    scheduler.unpause(r)
    plan = scheduler.plan(0.0)
    with pytest.raises(ValueError, match="in flight"):
        scheduler.detach(r)
    scheduler.apply_result(plan, StepResult([9]), 0.0)
    scheduler.detach(r)
