"""Facts of engines projected to their desired states: the input of scaling. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import structs

from daemon.ipc.messages import EngineFacts, EngineState


def emptied(last: EngineFacts, state: EngineState) -> EngineFacts:
    """Return the facts of an engine in `state` that holds nothing, given facts that it has published before."""
    return structs.replace(
        last,
        state=state,
        used_blocks=0,
        running=0,
        waiting=0,
        head_demand_blocks=0,
        pending_prefill_tokens=0,
        waiting_tokens=0,
        tokens_per_second=0.0,
        high_running=0,
        high_waiting=0,
        preempted_waiting=0,
        incoming=0,
        outgoing=0,
        pool_handle=b"",
        peer_pools=b"",
    )


def project(
    facts: Sequence[EngineFacts | None],
    predecessors: Sequence[EngineFacts | None],
    desired_states: Sequence[EngineState],
) -> list[EngineFacts | None]:
    """Return the facts with each engine in its desired state, so that no action is repeated before it takes effect.

    `predecessors[i]`: the last facts of the predecessor of engine i if i is loading, otherwise None. A loading engine
    counts as if it were up: otherwise scaling would wake another engine in each period for as long as loading takes.
    """
    projected: list[EngineFacts | None] = []
    for now, last, desired in zip(facts, predecessors, desired_states, strict=True):
        if now is not None:
            projected.append(structs.replace(now, state=desired))
        else:
            projected.append(emptied(last, desired) if last is not None else None)
    return projected
