"""Every string that travels between processes, into metrics or into JSON, by name. Pure; imports nothing of llumd."""

from __future__ import annotations

from enum import StrEnum


class MigrationReason(StrEnum):
    """Why a request moves."""

    DRAINING = "draining"  # its engine is drained or parked
    PREEMPTED = "preempted"  # its engine had to take memory from a running request
    MEMORY = "memory"  # its engine is short of KV blocks
    COMPUTE = "compute"  # its engine is short of compute
    OPERATOR = "operator"


class MigrationMode(StrEnum):
    """How one request moves."""

    LIVE = "live"  # KV is copied while the request decodes
    BLOCKING = "blocking"  # the request is frozen for the whole copy
    RECOMPUTE = "recompute"  # no KV is copied; the other engine computes it again


class MigrationChoice(StrEnum):
    """Which of several requests of equal priority moves first."""

    SHORTEST = "shortest"
    LONGEST = "longest"
    LAST = "last"  # the last one admitted


class MigrationResult(StrEnum):
    """How a migration ended. The request stays at its source after each of them but MOVED, unless it has finished."""

    MOVED = "moved"
    HANDED_BACK = "handed_back"  # its frontend starts it elsewhere: it had no KV worth copying
    DECLINED = "declined"
    FINISHED = "finished"  # the request ended before it could be moved
    PREEMPTED = "preempted"
    CANCELLED = "cancelled"
    COPY_FAILED = "copy_failed"
    PEER_DIED = "peer_died"
    TAKEN_BACK = "taken_back"  # its frontend gave it back to the source: the destination did not claim it in time


class DispatchKind(StrEnum):
    """Whether a request is given to an engine for the first time."""

    FIRST = "first"
    AGAIN = "again"


class Rejection(StrEnum):
    """Why a request is refused before it runs."""

    OVERLOADED = "overloaded"
    NO_ENGINE = "no_engine"
    TOO_LONG = "too_long"
    INVALID = "invalid"


class Resource(StrEnum):
    """What an engine can run short of."""

    MEMORY = "memory"
    COMPUTE = "compute"
