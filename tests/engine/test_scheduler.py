"""The scheduler's rules, one by one."""

import subprocess
import sys

import pytest

from daemon.engine.migration.llumlet import Llumlet
from daemon.engine.request import Request
from daemon.engine.runner import NO_TOKEN, StepResult
from daemon.engine.scheduler import Scheduler, fcfs
from daemon.ipc.messages import Finish, RequestParams, SamplingParams, TokenLogprobs
from daemon.kvpool.block_manager import BlockManager, PoolError

SIZE, EOS = 4, 2


def scheduler(blocks=100, seqs=8, tokens=64, max_len=1000, **options) -> Scheduler:
    return Scheduler(
        BlockManager(blocks + 1, SIZE),
        max_num_seqs=seqs,
        max_batch_tokens=tokens,
        max_model_len=max_len,
        eos_token_ids=(EOS,),
        **options,
    )


def request(rid, prompt=4, *, priority=0, arrival=None, epoch=1, frontend=0, output=(), **sampling) -> Request:
    """`prompt`: its length, and then no two requests share a prefix; or its tokens."""
    tokens = [1000 + rid] * prompt if isinstance(prompt, int) else list(prompt)
    params = RequestParams(
        SamplingParams(**{"max_tokens": 100, "seed": 0} | sampling), rid if arrival is None else arrival, priority
    )
    return Request(rid, epoch, frontend, params, [*tokens, *output], len(tokens))


def add(s: Scheduler, *requests: Request) -> None:
    for r in requests:
        assert s.add(r)


def step(s: Scheduler, token=9, now=0.0):
    """One step in which every row draws `token`: (rid, start, count) of the rows, rids preempted, emissions."""
    plan = s.plan(now)
    drawn = [token for row in plan.rows if row.sample]
    emissions = s.apply_result(plan, StepResult(drawn), now)
    s.check()
    return [(r.request.rid, r.start, r.count) for r in plan.rows], [r.rid for r in plan.preempted], emissions


def rids(s: Scheduler) -> tuple[list[int], list[int]]:
    return sorted(s.running), [r.rid for r in s.waiting]


# -- batches -----------------------------------------------------------------------------------


def test_decodes_come_first_and_chunks_fill_the_budget():
    s = scheduler(tokens=10)
    add(s, request(1, 4))
    assert step(s)[0] == [(1, 0, 4)]
    add(s, request(2, 15), request(3, 7))
    assert step(s)[0] == [(1, 4, 1), (2, 0, 9)]
    assert s.pending_prefill_tokens == 6 + 7 and s.waiting_tokens == 7
    assert step(s)[0] == [(1, 5, 1), (2, 9, 6), (3, 0, 3)]
    assert step(s)[0] == [(1, 6, 1), (2, 15, 1), (3, 3, 4)]
    assert s.plan(0).num_decodes == 3 and s.pending_prefill_tokens == 0


def test_chunks_shrink_beside_decodes_alone():
    s = scheduler(tokens=64, max_mixed_tokens=10)
    add(s, request(1, 40))
    assert step(s)[0] == [(1, 0, 40)]
    add(s, request(2, 30))
    assert step(s)[0] == [(1, 40, 1), (2, 0, 9)]
    s.cancel(1, 1)
    assert step(s)[0] == [(2, 9, 21)]


def test_a_block_goes_beside_decodes_however_small_the_limit():
    s = scheduler(tokens=64, max_mixed_tokens=2)
    add(s, request(1, 1), request(2, 1))
    step(s)
    add(s, request(3, 30))
    assert step(s)[0] == [(1, 1, 1), (2, 1, 1), (3, 0, SIZE)]


def test_nobody_is_admitted_for_whom_a_mixed_step_has_no_token():
    s = scheduler(tokens=64, max_mixed_tokens=10)
    add(s, request(1, 1))
    step(s)
    add(s, request(2, 9), request(3, 9))
    assert step(s)[0] == [(1, 1, 1), (2, 0, 9)]
    assert rids(s) == ([1, 2], [3])


def test_nothing_to_do_is_no_plan():
    assert scheduler().plan(0.0) is None


def test_an_urgent_prompt_goes_before_a_half_prefilled_one():
    s = scheduler(tokens=10)
    add(s, request(1, 50))
    step(s)
    add(s, request(2, 4, priority=-1), request(3, 4, arrival=0))
    assert step(s)[0] == [(2, 0, 4), (1, 10, 6)]
    assert rids(s) == ([1, 2], [3])


def test_everyone_in_the_batch_gets_a_token_each_step():
    s = scheduler(seqs=8, tokens=3)
    add(s, *(request(i, 1) for i in range(3)))
    step(s)
    add(s, request(9, 1, priority=-1))
    rows, preempted, _ = step(s)
    assert [row[0] for row in rows] == [0, 1, 9] and preempted == [2]


# -- the queue ---------------------------------------------------------------------------------


def test_nobody_overtakes_the_head():
    s = scheduler(blocks=10)
    add(s, request(1, 6 * SIZE))
    step(s)
    add(s, request(2, 8 * SIZE), request(3, 1))
    step(s)
    assert rids(s) == ([1], [2, 3])
    assert s.head_demand_blocks == 8
    s.cancel(1, 1)
    step(s)
    assert rids(s) == ([2, 3], [])


def test_classes_before_arrivals_and_the_key_within_a_class():
    s = scheduler(seqs=1, key=lambda r, now: len(r.tokens))
    add(s, request(1, 9), request(2, 3), request(3, 99, priority=-1), request(4, 5))
    assert [r.rid for r in s.waiting] == [3, 2, 4, 1]


def test_a_drifting_key_is_taken_anew_at_each_plan():
    def patience(r, now):  # the short go first until an hour has passed, then the old
        return len(r.tokens) if now < 3600 else r.params.arrival

    for drifts, first in ((False, 2), (True, 1)):
        s = scheduler(seqs=1, key=patience, drifts=drifts)
        add(s, request(1, 9), request(2, 3))
        assert step(s, now=3601.0)[0][0][0] == first


def test_admission_leaves_a_block_for_each_running_request_to_grow_into():
    s = scheduler(blocks=4)
    add(s, request(1, 7), request(2, 5))
    step(s)
    assert rids(s) == ([1], [2])
    s = scheduler(blocks=5)
    add(s, request(1, 7), request(2, 5))
    step(s)
    assert rids(s) == ([1, 2], [])


def test_a_request_of_the_whole_pool_runs_alone():
    s = scheduler(blocks=4)
    add(s, request(1, 4 * SIZE - 1))
    [emission] = step(s)[2]
    assert emission.finish is Finish.LENGTH
    assert s.blocks.num_used == 0


# -- preemption --------------------------------------------------------------------------------


def test_without_blocks_the_least_urgent_goes_and_comes_back_first():
    s = scheduler(blocks=6)
    add(s, request(1, 7), request(2, 7))
    step(s)
    step(s)
    step(s)  # 2 + 2 blocks full, each has taken a third
    add(s, request(3, 1))
    for _ in range(3):
        assert step(s)[1] == []
    rows, preempted, _ = step(s)
    assert preempted == [2] and [row[0] for row in rows] == [1]
    assert rids(s) == ([1], [2, 3])
    assert s.num_preemptions == 1
    s.cancel(1, 1)
    rows, _, emissions = step(s)
    assert rows == [(3, 0, 1), (2, 8, 5)]  # two of its blocks are still cached; request 1 took the third
    assert {e.request.rid: e.start for e in emissions} == {2: 6, 3: 0}


def test_the_lower_class_is_preempted_however_old():
    s = scheduler(blocks=6)
    add(s, request(1, 7, priority=1), request(2, 7))
    preempted = [step(s)[1] for _ in range(8)]
    assert [p for p in preempted if p] == [[1]]


def test_an_urgent_arrival_displaces_the_latest_of_the_least_urgent_when_the_batch_is_full():
    s = scheduler(seqs=3)
    add(s, request(1, priority=1), request(2, priority=1), request(3))
    step(s)
    add(s, request(4))
    assert step(s)[1] == [2]
    assert rids(s) == ([1, 3, 4], [2])


def test_an_urgent_arrival_displaces_as_many_as_its_blocks_take():
    s = scheduler(blocks=12)
    add(s, *(request(i, 9, priority=1) for i in range(3)))
    step(s)
    add(s, request(9, 20))
    assert step(s)[1] == [2, 1]
    assert rids(s) == ([0, 9], [1, 2])


def test_nobody_is_displaced_within_a_class_or_in_vain():
    s = scheduler(seqs=2)
    add(s, request(1), request(2))
    step(s)
    add(s, request(0, arrival=-1.0))
    assert step(s)[1] == [] and rids(s) == ([1, 2], [0])
    s = scheduler(blocks=12)
    add(s, request(1, 30), request(2, priority=1))
    step(s)
    add(s, request(0, 30, arrival=-1.0))
    assert step(s)[1] == [] and rids(s) == ([1, 2], [0])


# -- another priority ---------------------------------------------------------------------------


def test_who_waits_moves_in_the_queue():
    s = scheduler(seqs=1)
    add(s, *(request(i, 5) for i in range(1, 5)))
    s.reprioritise(s.get(3), -1)
    s.reprioritise(s.get(1), 1)
    assert [r.rid for r in s.waiting] == [3, 2, 4, 1]
    s.reprioritise(s.get(1), 0)
    assert [r.rid for r in s.waiting] == [3, 1, 2, 4]
    assert s.waiting_tokens == 20 and step(s)[0] == [(3, 0, 5)]


def test_who_is_put_off_keeps_the_key_it_has_waited_by():
    s = scheduler(seqs=1, key=lambda r, now: -now)  # who came back last goes first
    add(s, request(2, arrival=1.0))
    step(s)
    add(s, request(1, arrival=2.0))
    s.preempt(s.running[2], 9.0)
    s.reprioritise(s.get(1), 1)
    s.reprioritise(s.get(1), 0)
    s.reprioritise(s.get(2), 0)
    assert [r.rid for r in s.waiting] == [2, 1]


def test_who_waits_and_becomes_urgent_displaces_a_running_one_at_the_next_plan():
    s = scheduler(seqs=2)
    add(s, *(request(i) for i in range(1, 4)))
    step(s)
    s.reprioritise(s.get(3), -1)
    assert step(s)[1] == [2]
    assert rids(s) == ([1, 3], [2])


def test_who_runs_and_matters_less_makes_room_and_who_matters_more_stays():
    s = scheduler(seqs=2)
    add(s, *(request(i) for i in range(1, 4)))
    step(s)
    s.reprioritise(s.get(1), 1)
    assert step(s)[1] == [1] and rids(s) == ([2, 3], [1])
    s.reprioritise(s.get(3), -1)
    add(s, request(4, priority=-1))
    assert step(s)[1] == [2] and rids(s) == ([3, 4], [2, 1])


# -- prefixes ----------------------------------------------------------------------------------


def test_a_prefix_is_shared_once_computed_and_a_token_is_left_to_compute():
    s = scheduler()
    prompt = list(range(50, 50 + 3 * SIZE))
    add(s, request(1, prompt))
    step(s)
    first, second = request(2, prompt), request(3, [*prompt, 1])
    add(s, first, second)
    assert step(s)[0] == [(1, 12, 1), (3, 12, 1), (2, 8, 4)]
    assert (first.num_cached, second.num_cached) == (8, 12)
    assert first.block_table[:2] == s.running[1].block_table[:2]
    assert (s.prefix_query_tokens, s.prefix_hit_tokens) == (12 + 12 + 13, 20)


def test_cached_counts_prompt_tokens_at_the_first_admission_only():
    s = scheduler()
    prompt = list(range(50, 56))
    add(s, request(1, prompt, output=[8] * 10))
    step(s)
    again = request(2, prompt, output=[8] * 10)
    add(s, again)
    step(s)
    assert again.num_cached == 6
    assert (s.prefix_query_tokens, s.prefix_hit_tokens) == (12, 6)
    first = s.running[1]
    s.preempt(first, 0.0)
    step(s)
    assert first.num_computed == 18 and first.num_cached == 0
    assert (s.prefix_query_tokens, s.prefix_hit_tokens) == (12, 6)


def test_salts_do_not_share():
    s = scheduler()
    other = request(2, [5] * 9)
    other.params = RequestParams(other.sampling, 2.0, cache_salt=b"tenant")
    add(s, request(1, [5] * 9))
    step(s)
    add(s, other)
    step(s)
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
def test_it_ends(sampling, token, finishes_at, finish):
    s = scheduler(max_len=20)
    r = request(1, 4, **sampling)
    add(s, r)
    heard = [step(s, token)[2][0] for _ in range(finishes_at)]
    assert [e.start for e in heard] == list(range(finishes_at))
    assert [e.finish for e in heard] == [Finish.NONE] * (finishes_at - 1) + [finish]
    assert r.finish is finish and s.blocks.num_used == 0 and s.get(1) is None


def test_a_resumed_request_goes_on_where_its_output_ends():
    s = scheduler()
    add(s, request(1, 5, output=[8, 8, 8], max_tokens=5))
    rows, _, [emission] = step(s)
    assert rows == [(1, 0, 8)] and emission.start == 3
    assert step(s)[2][0].finish is Finish.LENGTH


def test_logprobs_follow_their_rows():
    s = scheduler(tokens=6)
    add(s, request(1, 2), request(2, 2), request(3, 5))
    plan = s.plan(0.0)
    lp = TokenLogprobs(-0.5, [9], [-0.5])
    first, second = s.apply_result(plan, StepResult([8, 9], [None, lp]), 0.0)
    assert (first.tokens, first.logprobs, second.tokens, second.logprobs) == ([8], None, [9], [lp])


# -- coming and going --------------------------------------------------------------------------


def test_only_a_newer_epoch_takes_the_place_of_an_older_one():
    s = scheduler()
    old, new = request(1, epoch=3), request(1, epoch=5, output=[8])
    add(s, old)
    assert not s.add(request(1, epoch=3)) and not s.add(request(1, epoch=2))
    step(s)
    add(s, new)
    assert s.get(1) is new and old.finish is Finish.CANCELLED
    assert not s.cancel(1, 4) and s.cancel(1, 5) and not s.cancel(1, 5)
    assert s.plan(0.0) is None and s.waiting_tokens == 0


def test_what_was_cancelled_or_preempted_during_the_step_is_not_heard():
    s = scheduler()
    add(s, *(request(i) for i in range(1, 5)))
    plan = s.plan(0.0)
    s.cancel(1, 1)
    s.preempt(s.running[2], 0.0)
    add(s, request(3, epoch=2))
    emissions = s.apply_result(plan, StepResult([11, 12, 13, 14]), 0.0)
    assert [(e.request.rid, e.tokens) for e in emissions] == [(4, [14])]
    s.check()


def test_a_row_of_an_older_epoch_is_not_taken_for_the_newer_one():
    s = scheduler()
    add(s, request(1))
    old_plan = s.plan(0.0)
    add(s, request(1, epoch=2, output=[8]))
    plan = s.plan(1.0)
    assert s.apply_result(old_plan, StepResult([11]), 2.0) == []
    assert [e.start for e in s.apply_result(plan, StepResult([12]), 2.0)] == [1]


def test_a_frontend_that_states_what_it_owns_loses_the_rest():
    s = scheduler(seqs=3)
    add(s, *(request(i, frontend=i % 2) for i in range(6)), request(6, epoch=2))
    step(s)
    held = [*s.running.values(), *s.waiting]
    Llumlet(s, journals=None).on_owned_requests(0, {0: 1, 2: 2, 6: 2}, 0.0)  # no journal is read for it
    assert sorted(r.rid for r in held if r.finish is Finish.CANCELLED) == [2, 4]
    assert rids(s) == ([0, 1], [3, 5, 6])
    s.check()


def test_what_can_never_run_is_refused():
    s = scheduler(blocks=5, max_len=30)
    assert "KV memory holds 20" in s.refuse(request(1, 20))
    assert "model takes 30" in s.refuse(request(1, 30))
    assert "empty" in s.refuse(request(1, 0))
    assert s.refuse(request(1, 19)) is None
    with pytest.raises(ValueError, match="KV memory"):
        s.add(request(1, 20))


def test_the_checker_sees_a_lost_table_and_a_request_in_two_places():
    s = scheduler()
    add(s, request(1), request(2))
    step(s)
    s.waiting.push(s.running[1], (0, 0.0, 1))
    with pytest.raises(PoolError, match="request 1 both waits and runs"):
        s.check()
    s.waiting.remove(s.running[1])
    del s.running[2]
    with pytest.raises(PoolError, match="0 tables hold it"):
        s.check()


def test_a_request_keeps_its_arrival():
    assert fcfs(request(1, arrival=5.0), 99.0) == 5.0


@pytest.mark.parametrize(
    "module",
    ["daemon.kvpool.block_manager", "daemon.engine.scheduler", "daemon.engine.request", "daemon.ipc.messages"],
)
def test_pure_modules_import_no_number_crunching(module):
    code = f"import sys, {module}; print(sorted({{'torch', 'numpy', 'numba'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_request_without_a_drawable_token_ends_alone():
    s = scheduler()
    add(s, request(1), request(2))
    lost, other = s.apply_result(s.plan(0.0), StepResult([NO_TOKEN, 9]), 0.0)
    s.check()
    assert (lost.request.rid, lost.tokens, lost.finish) == (1, [], Finish.ERROR)
    assert (other.request.rid, other.tokens, other.finish) == (2, [9], Finish.NONE)
    assert rids(s) == ([2], [])


# -- steps in flight -------------------------------------------------------------------------------


def test_the_next_step_computes_the_token_that_the_last_one_draws():
    s = scheduler()
    add(s, r := request(1, prompt=4))
    first = s.plan(0.0)
    second = s.plan(0.0)
    assert [(row.start, row.count, row.sample) for row in second.rows] == [(4, 1, True)]
    assert second.rows[0].start == len(r.tokens) and second.num_decodes == 1
    s.apply_result(first, StepResult([9]), 0.0)
    assert (r.num_computed, r.num_inflight_tokens, r.num_sampling) == (4, 1, True)
    s.apply_result(second, StepResult([8]), 0.0)
    assert r.tokens[4:] == [9, 8] and not r.in_flight and not r.num_sampling


def test_nothing_is_computed_past_the_last_token():
    s = scheduler()
    add(s, request(1, max_tokens=1))
    plan = s.plan(0.0)
    assert s.plan(0.0) is None
    assert s.apply_result(plan, StepResult([9]), 0.0)[0].finish == Finish.LENGTH


def test_a_row_planned_before_a_preemption_is_void_though_the_request_is_back():
    s = scheduler()
    add(s, r := request(1, prompt=4))
    first = s.plan(0.0)
    s.preempt(r, 0.0)
    second = s.plan(0.0)
    assert s.apply_result(first, StepResult([9]), 0.0) == []
    assert s.apply_result(second, StepResult([7]), 0.0)[0].tokens == [7]


def test_a_peer_gets_no_block_to_which_a_step_in_flight_still_writes():
    s = scheduler(blocks=4)
    add(s, request(1, prompt=4))
    plan = s.plan(0.0)
    written = list(s.running[1].block_table)
    assert s.cancel(1, 1) and s.num_unsettled == len(written) > 0
    free = s.blocks.num_free - len(written)
    assert not set(s.allocate_settled(free)) & set(written)
    with pytest.raises(PoolError):
        s.allocate_settled(1)
    s.apply_result(plan, StepResult([9]), 0.0)
    assert set(s.allocate_settled(1)) <= set(written)


def test_a_held_request_is_left_out_until_it_is_released():
    s = scheduler()
    add(s, r := request(1))
    step(s)
    s.hold(r)
    assert s.plan(0.0) is None
    s.release(r)
    plan = s.plan(0.0)
    with pytest.raises(ValueError, match="in flight"):
        s.detach(r)
    s.apply_result(plan, StepResult([9]), 0.0)
    s.detach(r)
