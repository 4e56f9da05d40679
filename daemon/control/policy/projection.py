"""What engines will be once they have done as wished: what scaling decides by. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import structs

from daemon.ipc.messages import EngineFacts, EngineState


def emptied(last: EngineFacts, state: EngineState) -> EngineFacts:
    """The facts of an engine whose predecessor published `last` and that holds nothing."""
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
    )


def outlook(
    facts: Sequence[EngineFacts | None], starting: Sequence[EngineFacts | None], desired_states: Sequence[EngineState]
) -> list[EngineFacts | None]:
    """Facts with each engine in its wished state, so that nothing is done twice while it comes about.

    `starting[i]`: of an engine that is up and loads, what its predecessor had published last. It counts as if it
    were there: else another would be woken, and another, for as long as loading takes.
    """
    expected: list[EngineFacts | None] = []
    for now, last, wish in zip(facts, starting, desired_states, strict=True):
        if now is not None:
            expected.append(structs.replace(now, state=wish))
        else:
            expected.append(emptied(last, wish) if last is not None else None)
    return expected
