"""The connection of one engine's KV pool with the pools of the other engines."""

from __future__ import annotations

from typing import NamedTuple

from daemon.kvpool.pool_directory import PeerPools
from daemon.kvpool.transport import Transport


class KvLink(NamedTuple):
    """What an engine needs to send KV blocks to its peers and to receive blocks from them."""

    num_blocks: int  # of this engine's pool, the dummy block included
    pools: PeerPools  # the pools of the other engines
    transport: Transport  # copies from this engine's pool into theirs
    handle: bytes = b""  # for the board: how peers open this pool; empty if they need no handle
