"""A successful move, event by event: what each side sends, keeps and frees."""

from __future__ import annotations

from daemon.engine.migration.actions import Copy, Send, Tell
from daemon.ipc.messages import Handover, Reserve, Reserved, Takeover, TokenLogprobs
from daemon.kvpool.block_manager import block_hashes
from tests.engine.migration.harness import (
    DESTINATION,
    SIZE,
    SOURCE,
    Engine,
    move_until_copying,
    move_until_takeover,
    only,
    relay,
)


def test_a_move_from_reserve_to_release(source, destination, make):
    request = source.run(make(prompt=9), 2)  # 10 computed, 11 known: two full blocks and one half-full block
    reserve_sent = only(source.move())
    assert reserve_sent == Send(
        DESTINATION,
        Reserve(
            move=1,
            rid=1,
            epoch=1,
            frontend=0,
            slot=1,
            reservation=0,
            num_tokens=11 + SIZE,
            longest=59,
            hashes=block_hashes(request.tokens[:8], SIZE),
        ),
    )
    answer = only(relay([reserve_sent], SOURCE, destination))
    assert answer.peer == SOURCE and isinstance(answer.message, Reserved) and len(answer.message.blocks) == 4
    copy = only(relay([answer], DESTINATION, source))
    assert copy == Copy(DESTINATION, 1, list(zip(request.block_table[:2], answer.message.blocks[:2], strict=True)))
    assert source.step() == [] and request.num_output == 3  # it continues to decode
    assert source.llumlet.copied(1, 0.0) == []
    tail = only(source.step())
    assert tail.pairs == [(request.block_table[2], answer.message.blocks[2])]
    assert source.llumlet.frozen == [request] and source.scheduler.plan(0.0) is None
    handover = only(source.llumlet.copied(1, 0.0))
    assert handover == Send(
        DESTINATION,
        Handover(move=1, rid=1, epoch=1, num_computed=12, num_cached=0, start=4, tokens=[], logprobs=None),
    )
    takeover = only(relay([handover], SOURCE, destination))
    assert takeover == Tell(0, Takeover(rid=1, epoch=1, start=4, tokens=[], logprobs=None))
    assert destination.step() == []
    destination.llumlet.on_grant(rid=1, epoch=1, new_epoch=2, now=0.0)
    moved = destination.scheduler.get(1)
    assert (moved.epoch, moved.tokens, moved.num_computed, moved.slot) == (2, request.tokens, 12, 1)
    assert moved.block_table == answer.message.blocks and moved.sampling == request.sampling
    destination.step()
    assert moved.num_output == 5
    assert source.llumlet.on_release(rid=1, epoch=1, now=0.0) == []
    assert source.is_empty and not source.llumlet.outgoing


def test_the_handover_carries_output_that_the_journal_lacks_with_its_logprobs(source, destination, make, journal):
    request = source.run(make(logprobs=0), 2)
    copy = move_until_copying(source, destination)
    source.llumlet.copied(copy.move, 0.0)
    journal.num_missing = 1
    tail = only(source.step())
    takeover = only(relay(source.llumlet.copied(tail.move, 0.0), SOURCE, destination)).message
    assert takeover == Takeover(rid=1, epoch=1, start=2, tokens=[7], logprobs=[TokenLogprobs(-2.0, [], [])])
    assert destination.llumlet.pending[0].tokens == request.tokens


def test_no_freeze_before_the_journal_holds_the_logprobs_of_the_prompt(source, destination, make, journal):
    request = source.run(make(), 3)
    journal.scored = False
    copy = move_until_copying(source, destination)
    source.llumlet.copied(copy.move, 0.0)
    assert source.step(seconds=1.0) == [] and source.llumlet.frozen == []
    journal.scored = True
    source.step(seconds=1.0)
    assert source.llumlet.frozen == [request]


def test_no_freeze_before_the_journal_holds_the_output_from_before_the_move(source, destination, make, journal):
    source.run(make(), 3)
    journal.num_missing = 2
    copy = move_until_copying(source, destination)
    source.llumlet.copied(copy.move, 0.0)
    assert source.step(seconds=1.0) == []  # 4 output tokens: 2 are journaled, 3 existed when the move began
    assert isinstance(only(source.step(seconds=1.0)), Copy) and source.llumlet.frozen


def test_blocks_in_the_prefix_cache_of_the_destination_are_not_copied(source, destination, make):
    destination.run(make(rid=2, prompt=9), 1)
    shared = destination.scheduler.get(2).block_table[:2]
    twin = make(rid=3, prompt=9)
    twin.tokens[:] = [1002] * 9
    source.run(twin, 1)
    answer = only(relay(source.move(), SOURCE, destination))
    assert answer.message.skip == 2 and len(answer.message.blocks) == 2
    destination.llumlet.on_release(rid=2, epoch=1, now=0.0)
    destination.check()
    assert all(b in destination.llumlet.tables()[0] for b in shared)  # held since the Reserved
    assert relay([answer], DESTINATION, source) == []
    tail = only(source.step())
    assert tail.pairs == [(twin.block_table[2], answer.message.blocks[0])]


def test_moved_blocks_enter_the_prefix_cache_only_after_the_grant(source, destination, make):
    request = source.run(make(), 2)
    hashes = block_hashes(request.tokens[:8], SIZE)
    move_until_takeover(source, destination)
    assert destination.blocks.match(hashes) == []
    destination.llumlet.on_grant(rid=1, epoch=1, new_epoch=2, now=0.0)
    assert destination.blocks.match(hashes) == destination.scheduler.get(1).block_table[:2]


def test_copies_follow_until_little_is_left(source, destination, make):
    request = source.run(make(prompt=9), 1)
    copy = move_until_copying(source, destination)
    for _ in range(2 * SIZE + 2):  # a slow copy: more than two blocks are filled meanwhile
        assert source.step(seconds=1.0) == []
    source.llumlet.copied(copy.move, 100.0)
    reserve_sent = only(source.step(now=100.0, seconds=1.0))
    assert reserve_sent.message.reservation == 1 and reserve_sent.message.hashes == [] and not source.llumlet.frozen
    more = only(relay([reserve_sent], SOURCE, destination))
    second = only(relay([more], DESTINATION, source))
    assert [a for a, _ in second.pairs] == request.block_table[2:5]
    source.llumlet.copied(second.move, 100.0)  # a copy that takes no time
    assert isinstance(only(source.step(now=100.0, seconds=1.0)), Copy) and source.llumlet.frozen


def test_a_rest_that_copies_within_a_step_is_small_enough_to_freeze(source, destination, make):
    source.run(make(prompt=9), 1)
    copy = move_until_copying(source, destination)
    for _ in range(4):
        source.step()
    source.llumlet.copied(copy.move, 0.2)  # 0.1 s per block
    tail = only(source.step(now=0.2, seconds=0.25))
    assert len(tail.pairs) == 2 and source.llumlet.frozen


def test_a_half_prefilled_request_moves_with_the_kv_it_has(journal, destination, make):
    source = Engine(journal, tokens=8)
    request = source.run(make(prompt=30), 1)
    copy = only(relay(relay(source.move(rid=1), SOURCE, destination), DESTINATION, source))
    assert [a for a, _ in copy.pairs] == request.block_table[:2]
    source.llumlet.copied(copy.move, 0.0)
    tail = only(source.step(seconds=1.0))
    assert source.llumlet.frozen == [request] and [a for a, _ in tail.pairs] == request.block_table[2:4]
    relay(source.llumlet.copied(tail.move, 0.0), SOURCE, destination)
    destination.llumlet.on_grant(rid=1, epoch=1, new_epoch=2, now=5.0)
    moved = destination.scheduler.get(1)
    assert (moved.num_computed, moved.pending, moved.admitted) == (16, 14, 5.0)
    destination.step()
    assert moved.num_output == 1
