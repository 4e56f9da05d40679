"""Batches, the queue, preemption and priorities of the scheduler."""

from daemon.ipc.messages import Finish
from tests.engine.scheduler_harness import SIZE, add, make_request, make_scheduler, rids, run_step

# -- batches -----------------------------------------------------------------------------------


def test_decodes_come_first_and_chunks_fill_the_budget():
    scheduler = make_scheduler(tokens=10)
    add(scheduler, make_request(1, 4))
    assert run_step(scheduler)[0] == [(1, 0, 4)]
    add(scheduler, make_request(2, 15), make_request(3, 7))
    assert run_step(scheduler)[0] == [(1, 4, 1), (2, 0, 9)]
    assert scheduler.pending_prefill_tokens == 6 + 7 and scheduler.waiting_tokens == 7
    assert run_step(scheduler)[0] == [(1, 5, 1), (2, 9, 6), (3, 0, 3)]
    assert run_step(scheduler)[0] == [(1, 6, 1), (2, 15, 1), (3, 3, 4)]
    assert scheduler.plan(0).num_decodes == 3 and scheduler.pending_prefill_tokens == 0


def test_chunks_are_limited_only_beside_decodes():
    scheduler = make_scheduler(tokens=64, max_mixed_tokens=10)
    add(scheduler, make_request(1, 40))
    assert run_step(scheduler)[0] == [(1, 0, 40)]
    add(scheduler, make_request(2, 30))
    assert run_step(scheduler)[0] == [(1, 40, 1), (2, 0, 9)]
    scheduler.cancel(1, 1)
    assert run_step(scheduler)[0] == [(2, 9, 21)]


def test_one_block_of_prefill_is_allowed_beside_decodes_whatever_the_limit():
    scheduler = make_scheduler(tokens=64, max_mixed_tokens=2)
    add(scheduler, make_request(1, 1), make_request(2, 1))
    run_step(scheduler)
    add(scheduler, make_request(3, 30))
    assert run_step(scheduler)[0] == [(1, 1, 1), (2, 1, 1), (3, 0, SIZE)]


def test_no_request_is_admitted_without_a_token_for_it_in_the_mixed_step():
    scheduler = make_scheduler(tokens=64, max_mixed_tokens=10)
    add(scheduler, make_request(1, 1))
    run_step(scheduler)
    add(scheduler, make_request(2, 9), make_request(3, 9))
    assert run_step(scheduler)[0] == [(1, 1, 1), (2, 0, 9)]
    assert rids(scheduler) == ([1, 2], [3])


def test_without_requests_there_is_no_plan():
    assert make_scheduler().plan(0.0) is None


def test_an_urgent_prompt_goes_before_a_half_prefilled_one():
    scheduler = make_scheduler(tokens=10)
    add(scheduler, make_request(1, 50))
    run_step(scheduler)
    add(scheduler, make_request(2, 4, priority=-1), make_request(3, 4, arrival=0))
    assert run_step(scheduler)[0] == [(2, 0, 4), (1, 10, 6)]
    assert rids(scheduler) == ([1, 2], [3])


def test_every_request_in_the_batch_gets_a_token_in_each_step():
    scheduler = make_scheduler(seqs=8, tokens=3)
    add(scheduler, *(make_request(i, 1) for i in range(3)))
    run_step(scheduler)
    add(scheduler, make_request(9, 1, priority=-1))
    rows, preempted, _ = run_step(scheduler)
    assert [row[0] for row in rows] == [0, 1, 9] and preempted == [2]


# -- the queue ---------------------------------------------------------------------------------


def test_no_request_overtakes_the_head_of_the_queue():
    scheduler = make_scheduler(blocks=10)
    add(scheduler, make_request(1, 6 * SIZE))
    run_step(scheduler)
    add(scheduler, make_request(2, 8 * SIZE), make_request(3, 1))
    run_step(scheduler)
    assert rids(scheduler) == ([1], [2, 3])
    assert scheduler.head_demand_blocks == 8
    scheduler.cancel(1, 1)
    run_step(scheduler)
    assert rids(scheduler) == ([2, 3], [])


def test_the_queue_is_ordered_by_class_and_by_key_within_a_class():
    scheduler = make_scheduler(seqs=1, key=lambda r, now: len(r.tokens))
    add(scheduler, make_request(1, 9), make_request(2, 3), make_request(3, 99, priority=-1), make_request(4, 5))
    assert [r.rid for r in scheduler.waiting] == [3, 2, 4, 1]


def test_admission_leaves_a_block_for_each_running_request_to_grow_into():
    scheduler = make_scheduler(blocks=4)
    add(scheduler, make_request(1, 7), make_request(2, 5))
    run_step(scheduler)
    assert rids(scheduler) == ([1], [2])
    scheduler = make_scheduler(blocks=5)
    add(scheduler, make_request(1, 7), make_request(2, 5))
    run_step(scheduler)
    assert rids(scheduler) == ([1, 2], [])


def test_a_request_of_the_whole_pool_runs_alone():
    scheduler = make_scheduler(blocks=4)
    add(scheduler, make_request(1, 4 * SIZE - 1))
    [emission] = run_step(scheduler)[2]
    assert emission.finish is Finish.LENGTH
    assert scheduler.blocks.num_used == 0


# -- preemption --------------------------------------------------------------------------------


def test_without_blocks_the_least_urgent_request_is_preempted_and_comes_back_first():
    scheduler = make_scheduler(blocks=6)
    add(scheduler, make_request(1, 7), make_request(2, 7))
    run_step(scheduler)
    run_step(scheduler)
    run_step(scheduler)  # 2 + 2 blocks full, each has taken a third
    add(scheduler, make_request(3, 1))
    for _ in range(3):
        assert run_step(scheduler)[1] == []
    rows, preempted, _ = run_step(scheduler)
    assert preempted == [2] and [row[0] for row in rows] == [1]
    assert rids(scheduler) == ([1], [2, 3])
    assert scheduler.num_preemptions == 1
    scheduler.cancel(1, 1)
    rows, _, emissions = run_step(scheduler)
    assert rows == [(3, 0, 1), (2, 8, 5)]  # two of its blocks are still cached; request 1 took the third
    assert {e.request.rid: e.start for e in emissions} == {2: 6, 3: 0}


def test_the_less_urgent_class_is_preempted_even_if_it_arrived_first():
    scheduler = make_scheduler(blocks=6)
    add(scheduler, make_request(1, 7, priority=1), make_request(2, 7))
    preempted = [run_step(scheduler)[1] for _ in range(8)]
    assert [p for p in preempted if p] == [[1]]


def test_in_a_full_batch_an_urgent_request_preempts_the_latest_of_the_least_urgent():
    scheduler = make_scheduler(seqs=3)
    add(scheduler, make_request(1, priority=1), make_request(2, priority=1), make_request(3))
    run_step(scheduler)
    add(scheduler, make_request(4))
    assert run_step(scheduler)[1] == [2]
    assert rids(scheduler) == ([1, 3, 4], [2])


def test_an_urgent_request_preempts_as_many_as_its_blocks_need():
    scheduler = make_scheduler(blocks=12)
    add(scheduler, *(make_request(i, 9, priority=1) for i in range(3)))
    run_step(scheduler)
    add(scheduler, make_request(9, 20))
    assert run_step(scheduler)[1] == [2, 1]
    assert rids(scheduler) == ([0, 9], [1, 2])


def test_no_request_is_preempted_within_its_class_or_if_that_does_not_suffice():
    scheduler = make_scheduler(seqs=2)
    add(scheduler, make_request(1), make_request(2))
    run_step(scheduler)
    add(scheduler, make_request(0, arrival=-1.0))
    assert run_step(scheduler)[1] == [] and rids(scheduler) == ([1, 2], [0])
    scheduler = make_scheduler(blocks=12)
    add(scheduler, make_request(1, 30), make_request(2, priority=1))
    run_step(scheduler)
    add(scheduler, make_request(0, 30, arrival=-1.0))
    assert run_step(scheduler)[1] == [] and rids(scheduler) == ([1, 2], [0])


# -- a change of priority ------------------------------------------------------------------------


def test_a_waiting_request_moves_in_the_queue():
    scheduler = make_scheduler(seqs=1)
    add(scheduler, *(make_request(i, 5) for i in range(1, 5)))
    scheduler.reprioritise(scheduler.get(3), -1)
    scheduler.reprioritise(scheduler.get(1), 1)
    assert [r.rid for r in scheduler.waiting] == [3, 2, 4, 1]
    scheduler.reprioritise(scheduler.get(1), 0)
    assert [r.rid for r in scheduler.waiting] == [3, 1, 2, 4]
    assert scheduler.waiting_tokens == 20 and run_step(scheduler)[0] == [(3, 0, 5)]


def test_a_reprioritised_request_keeps_its_key():
    scheduler = make_scheduler(seqs=1, key=lambda r, now: -now)  # the last to come back goes first
    add(scheduler, make_request(2, arrival=1.0))
    run_step(scheduler)
    add(scheduler, make_request(1, arrival=2.0))
    scheduler.preempt(scheduler.running[2], 9.0)
    scheduler.reprioritise(scheduler.get(1), 1)
    scheduler.reprioritise(scheduler.get(1), 0)
    scheduler.reprioritise(scheduler.get(2), 0)
    assert [r.rid for r in scheduler.waiting] == [2, 1]


def test_a_waiting_request_that_becomes_urgent_preempts_a_running_one_at_the_next_plan():
    scheduler = make_scheduler(seqs=2)
    add(scheduler, *(make_request(i) for i in range(1, 4)))
    run_step(scheduler)
    scheduler.reprioritise(scheduler.get(3), -1)
    assert run_step(scheduler)[1] == [2]
    assert rids(scheduler) == ([1, 3], [2])


def test_a_running_request_is_preempted_or_kept_by_its_new_class():
    scheduler = make_scheduler(seqs=2)
    add(scheduler, *(make_request(i) for i in range(1, 4)))
    run_step(scheduler)
    scheduler.reprioritise(scheduler.get(1), 1)
    assert run_step(scheduler)[1] == [1] and rids(scheduler) == ([2, 3], [1])
    scheduler.reprioritise(scheduler.get(3), -1)
    add(scheduler, make_request(4, priority=-1))
    assert run_step(scheduler)[1] == [2] and rids(scheduler) == ([3, 4], [2, 1])
