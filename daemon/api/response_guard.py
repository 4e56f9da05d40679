"""Makes a response outlive this process: its connection is kept, and its bytes go through the outbox."""

from __future__ import annotations

from collections.abc import Sequence

from aiohttp.base_protocol import BaseProtocol

from daemon.api.connections import Connection
from daemon.api.outbox_writer import RING_BYTES, OutboxWriter
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
        If there is no room, or the connection cannot be kept, the response goes on without, and is counted.
        """
        if not isinstance(protocol, Connection):
            return
        token = await protocol.keep()
        if protocol.transport is None:  # the writer will notice
            return
        slot = self._open_slot(protocol, token, facts, state) if token else None
        if slot is None:
            self._page.inc("responses_unguarded")
        else:
            writer.guard(slot)
            protocol.continued = True

    def _open_slot(
        self, connection: Connection, token: int, facts: ResponseFacts, state: Sequence[int] | None
    ) -> OutboxSlot | None:
        taken = bytes_taken(connection.sock)
        if taken is None:
            return None
        assert connection.transport is not None
        # An earlier response to a client that pipelines may still wait: it goes first.
        baseline = taken + connection.transport.get_write_buffer_size()
        state = state or [0] * (1 + len(facts.slots))
        try:
            return self._outbox.open(
                encode_facts(facts), state, token=token, baseline=baseline, ring_bytes=RING_BYTES
            )
        except OutboxFull:
            return None
