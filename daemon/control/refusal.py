"""The error for an operator's request that cannot be carried out."""

from __future__ import annotations

from collections.abc import Sequence

from daemon.ipc.messages import EngineFacts

# codes for scripts
REFUSED, NOT_FOUND, SHUTTING_DOWN = "refused", "not_found", "shutting_down"
OTHER_WEIGHTS = "other_weights"


class Refusal(Exception):
    """An operator's request cannot be carried out; the message says why, and `code` is one of those above."""

    def __init__(self, message: str, code: str = REFUSED) -> None:
        super().__init__(message)
        self.code = code


def running_engine(facts: Sequence[EngineFacts | None], engine: int) -> EngineFacts:
    """Return the facts of `engine`. Raises Refusal if there is no such engine, or if it does not run."""
    if not 0 <= engine < len(facts):
        raise no_engine(engine)
    found = facts[engine]
    if found is None:
        raise Refusal(f"engine {engine} does not run now: it starts, or it has died; `llumctl status` shows it")
    return found


def no_engine(engine: int) -> Refusal:
    """Return the error for an engine that does not exist."""
    return Refusal(f"there is no engine {engine}; `llumctl status` lists them", NOT_FOUND)
