"""A key for each state of a `World`: equal for states that differ only in the numbers of their blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from daemon.engine.request import Request
from daemon.engine.scheduler import Scheduler
from daemon.ipc.messages import EngineIncarnation, Reserved, Struct
from tests.protocol.engine_model import ActiveRow, Engine, Record
from tests.protocol.world import World


def state_key(world: World) -> tuple[Any, ...]:
    """Return the key of the state that `world` is in."""
    orders = [_block_order(engine) for engine in world.engines]
    incarnations = [engine.identity for engine in world.engines]

    def block_key(peer: EngineIncarnation, number: int) -> int:
        return orders[peer.engine][number] if peer in incarnations else number

    def record_key(a: int, record: Record) -> Any:
        message = record.message
        if isinstance(message, Reserved):
            writer = EngineIncarnation(a, record.sender)
            message = msgspec.structs.replace(message, blocks=[block_key(writer, b) for b in message.blocks])
        return record.sender, type(message).__name__, _freeze(message)

    return (
        world.incarnation,
        world.generation,
        world.budget,
        tuple(world.known),
        tuple((e.open, e.ownership, e.owner, e.weights, e.begun, tuple(e.output)) for e in world.entries.values()),
        tuple(sorted(world.notices)),
        tuple(tuple(record_key(a, r) for r in ring) for (a, _), ring in world.rings.items()),
        tuple(_engine_key(e, orders[e.index], block_key) for e in world.engines),
    )


def _block_order(engine: Engine) -> dict[int, int]:
    """Number the blocks by first appearance: in the block tables in order, then in the free list."""
    order: dict[int, int] = {0: 0}
    tables = [r.block_table for r in engine.scheduler.running.values()] + engine.llumlet.tables()
    for table in (*tables, engine.scheduler.blocks._free):
        for block in table:
            order.setdefault(block, len(order))
    return order


def _engine_key(
    engine: Engine, order: dict[int, int], block_key: Callable[[EngineIncarnation, int], int]
) -> tuple[Any, ...]:
    scheduler, llumlet, blocks = engine.scheduler, engine.llumlet, engine.scheduler.blocks
    memory = tuple((blocks._hashes[b], tuple(engine.memory[b])) for b in order if b)
    outgoing = tuple(
        (
            o.move, o.peer, _request_key(o.request, order), o.request in llumlet.frozen,
            llumlet.source.is_intact(o), o.first_logprob, o.phase.value, o.reservation,
            tuple(block_key(o.peer, b) for b in o.table), o.num_present, o.copy_end, _freeze(o.tail),
        )
        for o in llumlet.outgoing.values()
    )  # fmt: skip
    incoming = tuple(
        (
            i.peer, _freeze(i.reserve), tuple(order[b] for b in i.table),
            i.request and _request_key(i.request, order), _freeze(i.claim),
        )
        for i in llumlet.incoming.values()
    )  # fmt: skip
    active_rows = engine.step_in_flight.rows if engine.step_in_flight else []
    copies = tuple(
        (c.move, c.peer, tuple((order[a], block_key(c.peer, b)) for a, b in c.pairs)) for c in engine.copies
    )
    return (
        engine.incarnation, engine.frontend, tuple(engine.known), memory, copies, scheduler.num_reserved_places,
        len(blocks._free), tuple(_request_key(r, order) for r in scheduler.running.values()),
        tuple(_request_key(r, order) for r in scheduler.waiting), llumlet.source.num_moves, outgoing, incoming,
        tuple(_active_row_key(active, scheduler, order) for active in active_rows),
        tuple(sorted(order[b] for b in scheduler._unsettled)),
    )  # fmt: skip


def _active_row_key(active: ActiveRow, scheduler: Scheduler, order: dict[int, int]) -> tuple[Any, ...]:
    row = active.row
    is_current = scheduler.running.get(row.request.rid) is row.request and row.request.preemptions == row.preemptions
    table = tuple(order[b] for b in active.table)
    return (
        row.request.rid,
        row.request.epoch,
        row.start,
        row.count,
        row.sample,
        is_current,
        tuple(active.tokens),
        table,
    )


def _request_key(request: Request, order: dict[int, int]) -> tuple[Any, ...]:
    table = tuple(order[b] for b in request.block_table)
    output = tuple(request.tokens[request.prompt_len :])
    progress = (request.num_computed, request.num_inflight_tokens, request.num_sampling, request.paused)
    return request.rid, request.epoch, request.params.priority, output, table, progress


def _freeze(value: Any) -> Any:
    """Return a hashable copy of a message."""
    if isinstance(value, Struct):
        return tuple(_freeze(getattr(value, f)) for f in value.__struct_fields__)
    if isinstance(value, list | tuple):
        return tuple(_freeze(v) for v in value)
    return value
