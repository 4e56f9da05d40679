"""The error for an operator's request that cannot be carried out."""

from __future__ import annotations

from collections.abc import Sequence

from daemon.ipc.messages import EngineFacts


class Refusal(Exception):
    """An operator's request cannot be carried out; the message says why."""


def running_engine(facts: Sequence[EngineFacts | None], engine: int) -> EngineFacts:
    """Return the facts of `engine`. Raises Refusal if no such engine runs."""
    found = facts[engine] if 0 <= engine < len(facts) else None
    if found is None:
        raise Refusal(f"there is no engine {engine} that runs")
    return found
