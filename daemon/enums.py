"""The strings that go between processes or into metrics and JSON, as enums. Pure; imports no module of llumd."""

from __future__ import annotations

from enum import StrEnum


class MigrationReason(StrEnum):
    """Why a request migrates."""

    DRAINING = "draining"  # its engine is drained or parked
    PREEMPTED = "preempted"  # its engine has preempted a running request for lack of memory
    MEMORY = "memory"  # its engine is short of KV blocks
    COMPUTE = "compute"  # its engine is short of compute
    OPERATOR = "operator"


class MigrationMode(StrEnum):
    """How a request migrates."""

    LIVE = "live"  # KV is copied while the request decodes
    BLOCKING = "blocking"  # the request is frozen for the whole copy
    RECOMPUTE = "recompute"  # no KV is copied; the destination computes it again


class MigrationChoice(StrEnum):
    """Which of several requests with equal priority migrates first."""

    SHORTEST = "shortest"
    LONGEST = "longest"
    LAST = "last"  # the one admitted last


class MigrationResult(StrEnum):
    """How a migration ended. The request stays at its source unless it has moved, was handed back or has ended."""

    MOVED = "moved"
    HANDED_BACK = "handed_back"  # it had no KV worth a copy; its frontend dispatches it again
    DECLINED = "declined"
    FINISHED = "finished"  # the request ended before it was moved
    PREEMPTED = "preempted"
    CANCELLED = "cancelled"
    COPY_FAILED = "copy_failed"
    PEER_DIED = "peer_died"
    TAKEN_BACK = "taken_back"  # the destination did not claim it in time; the source reclaimed it from its frontend


class DispatchKind(StrEnum):
    """Whether a dispatch is the first one of its request."""

    FIRST = "first"
    AGAIN = "again"


class Rejection(StrEnum):
    """Why a request is rejected before it runs."""

    OVERLOADED = "overloaded"
    NO_ENGINE = "no_engine"
    TOO_LONG = "too_long"
    INVALID = "invalid"


class EarlyEnd(StrEnum):
    """Why a request has ended before its output was complete."""

    CLIENT = "client"  # it closed the connection
    DEADLINE = "deadline"  # `request_deadline`
    OPERATOR = "operator"
    SHUTDOWN = "shutdown"  # the daemon ends
    ENGINE = "engine"  # its engine died or could not continue it
    FRONTEND = "frontend"  # its frontend died before it had begun the response


class Resource(StrEnum):
    """The resources that an engine can be short of."""

    MEMORY = "memory"
    COMPUTE = "compute"


class ConnectionEnd(StrEnum):
    """Why a frontend closed a connection before its client did."""

    NO_REQUEST = "no_request"  # no complete request head in time
    LIMIT = "limit"  # idle for longest when the limit of connections was reached
    REFUSED = "refused"  # the limit was reached and no connection was idle
    SLOW_READER = "slow_reader"  # the client did not read its answer
