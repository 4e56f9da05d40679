"""The actions that an llumlet returns, and the journals that it reads. Pure."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from daemon.engine.request import Request
from daemon.enums import MigrationResult
from daemon.ipc.messages import EngineIncarnation, HandBack, Reclaim, Refused, Takeover, ToPeer

Note = Refused | Takeover | Reclaim | HandBack  # a message to a frontend, other than a step's output


class Send(NamedTuple):
    """Put `message` on the ring to that incarnation of the engine; drop it if the incarnation is dead."""

    peer: EngineIncarnation
    message: ToPeer


class Tell(NamedTuple):
    """Put `message` on the ring to the frontend."""

    frontend: int
    message: Note


class Readdress(NamedTuple):
    """From now on everything for the frontend, also what is queued, is for this incarnation of it."""

    frontend: int
    incarnation: int


class Copy(NamedTuple):
    """Copy blocks into the peer's pool while steps run; then call `copied` or `copy_failed`."""

    peer: EngineIncarnation
    move: int
    pairs: list[tuple[int, int]]  # (block here, block at the peer)


class Report(NamedTuple):
    """A record for the operator: a move, or an order to move, is over. Times are in seconds."""

    request: Request
    to: int  # engine; -1: the frontend chooses one
    reason: str  # of the order
    result: MigrationResult
    detail: str = ""
    num_copies: int = 0  # copies begun
    blocks: int = 0  # blocks copied
    skipped: int = 0  # blocks that the destination already had
    seconds: float = 0.0
    frozen_seconds: float = 0.0


Action = Send | Tell | Readdress | Copy | Report


class Journals(Protocol):
    """The frontends' journals, as the llumlet reads them."""

    def accepted(self, request: Request) -> int:
        """Return the number of output tokens that the frontend has journaled; -1 if the journal slot belongs to
        another request."""
        ...

    def is_scored(self, request: Request) -> bool:
        """Return True if the frontend has journaled all logprobs of the prompt that the request asks for."""
        ...

    def load(self, frontend: int, slot: int, rid: int, epoch: int) -> Request | None:
        """Return the request with its journaled output; None unless the slot holds it at exactly this epoch."""
        ...
