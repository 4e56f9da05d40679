"""Makes a response outlive this process: its connection is kept, and its bytes go through the outbox."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from aiohttp.base_protocol import BaseProtocol

from daemon.api.connections import Connection
from daemon.api.generator import Overloaded
from daemon.api.outbox_writer import RING_BYTES, ROOM_POLL, ROOM_WAIT, OutboxWriter
from daemon.api.response_facts import ResponseFacts, encode_facts
from daemon.ipc.kept_sockets import bytes_taken
from daemon.ipc.metrics_page import MetricsPage
from daemon.ipc.outbox import Outbox, OutboxFull, OutboxSlot


class ResponseGuard:
    """Opens the outbox slots of one frontend's responses."""

    def __init__(self, outbox: Outbox, page: MetricsPage) -> None:
        self._outbox = outbox
        self._page = page

    async def open(
        self,
        protocol: BaseProtocol | None,
        writer: OutboxWriter,
        facts: ResponseFacts,
        state: Sequence[int] | None = None,
    ) -> None:
        """Let `writer`, on the connection `protocol`, commit the bytes of this response from now on.

        `state`: what the client has already of the answer; None: nothing.
        If the connection cannot be kept, or the outbox can never hold the response, it goes on without, and is
        counted. Raises Overloaded if the outbox has no room now, and has none for a while.
        """
        if not isinstance(protocol, Connection):
            return
        token = await protocol.keep()
        slot = await self._open_slot(protocol, token, facts, state) if token else None
        if protocol.transport is None:  # the writer will notice
            if slot is not None:
                slot.close()
        elif slot is None:
            self._page.inc("responses_unguarded")
        else:
            writer.guard(slot)
            protocol.continued = True

    async def _open_slot(
        self, connection: Connection, token: int, facts: ResponseFacts, state: Sequence[int] | None
    ) -> OutboxSlot | None:
        loop = asyncio.get_running_loop()
        end = loop.time() + ROOM_WAIT
        encoded, state = encode_facts(facts), state or [0] * (1 + len(facts.slots))
        while connection.transport is not None and (taken := bytes_taken(connection.sock)) is not None:
            # An earlier response to a client that pipelines may still wait: it goes first.
            baseline = taken + connection.transport.get_write_buffer_size()
            try:
                return self._outbox.open(encoded, state, token=token, baseline=baseline, ring_bytes=RING_BYTES)
            except OutboxFull as e:
                if not self._outbox.can_hold(encoded, state, RING_BYTES):
                    return None
                if loop.time() >= end:
                    raise Overloaded(f"too many responses are on their way: {e}; please try again") from None
            await asyncio.sleep(ROOM_POLL)
        return None
