"""The interface of a KV block copy between two engines' pools, and the parts that every backend shares. Pure."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from enum import IntEnum
from typing import Any, NamedTuple, Protocol

MAX_PUSHES = 64  # in flight at a time


class Outcome(IntEnum):
    """How a push ended."""

    DONE = 1  # every byte is in the peer's pool
    CANCELLED = 2  # cancelled before its last slice
    FAILED = 3  # `Completion.reason` says why


class Completion(NamedTuple):
    """The end of a push. From now on it reads no byte of this pool and writes no byte of the peer's pool."""

    key: Hashable
    nbytes: int  # bytes that were copied
    seconds: float  # since `push`, waiting and rests included
    outcome: Outcome = Outcome.DONE
    reason: str = ""


class Transport(Protocol):
    """Copies blocks from one engine's pool into its peers' pools. Call it from the engine's loop only.

    No call except `close` takes longer than the copy of one slice. Until the completion of a push, the source must
    not change its blocks and the destination must keep its blocks reserved. Pushes share the bandwidth evenly and end
    in any order.
    """

    def push(self, key: Hashable, peer_pool: Any, pairs: Sequence[tuple[int, int]], block_bytes: int) -> None:
        """Start to copy blocks by pairs (block here, block there) into `peer_pool`, in no particular order.

        `peer_pool` is what the backend's `PeerPools` returns. A bad `peer_pool`, bad `pairs` or a full queue lead to
        a failed completion, not to an exception. Raises ValueError if `key` names a push that is in flight.
        """
        ...

    def cancel(self, key: Hashable) -> bool:
        """Stop the push `key` after the slices that are under way. Return True if its completion is still to come.

        That completion may still be DONE. False means that there is no such push and that nothing of it is being
        written.
        """
        ...

    def completed(self) -> list[Completion]:
        """Return the pushes that ended since the last call, each exactly once. The doorbell rings for each end."""
        ...

    def close(self) -> None:
        """Cancel all pushes and wait for their end, at most the copy of one slice."""
        ...


class Run(NamedTuple):
    """`length` adjacent blocks that go to adjacent places."""

    source: int
    destination: int
    length: int


def merge(pairs: Sequence[tuple[int, int]]) -> list[Run]:
    """Return runs that cover `pairs` of (source block, destination block), by ascending source.

    The number of runs is minimal if no source occurs twice. Raises ValueError if a destination occurs twice: its
    content would depend on the order of the copies.
    """
    if len({destination for _, destination in pairs}) < len(pairs):
        raise ValueError("a block is named twice as a destination")
    runs = []
    source, destination, length = -1, -1, 0
    for pair in sorted(pairs):
        if length and pair == (source + length, destination + length):
            length += 1
            continue
        if length:
            runs.append(Run(source, destination, length))
        (source, destination), length = pair, 1
    return [*runs, Run(source, destination, length)] if length else runs


def check_bounds(what: str, block: int, length: int, block_bytes: int, size: int) -> None:
    """Raise ValueError unless the `length` blocks from `block` on are inside a pool of `size` bytes."""
    if block_bytes < 1 or block < 0 or (block + length) * block_bytes > size:
        where = f"{what} blocks {block} to {block + length - 1} of {block_bytes} bytes"
        raise ValueError(f"{where} are not in a pool of {size} bytes")
