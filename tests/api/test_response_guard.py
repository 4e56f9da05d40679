"""A response gets a place in the outbox, waits for one, or is refused."""

from __future__ import annotations

import asyncio
import socket
from types import SimpleNamespace
from typing import Any

import pytest

from daemon.api import response_guard
from daemon.api.connections import Connection
from daemon.api.generator import Overloaded
from daemon.api.outbox_writer import RING_BYTES
from daemon.api.response_guard import ResponseGuard
from daemon.ipc.outbox import Outbox
from tests.api.test_response_succession import connected, facts


class KeptConnection(Connection):
    """One whose socket the supervisor keeps."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.transport: Any = SimpleNamespace(get_write_buffer_size=lambda: 0)

    async def keep(self) -> int:
        return 1


async def guarded(outbox: Outbox, *, release_after: float = -1.0, echo: str = "") -> tuple[list[Any], list[str]]:
    """Fill the outbox, open one more response, and return what it got and what was counted."""
    held = []
    while outbox.free_bytes > RING_BYTES + 1024:
        held.append(outbox.open(b"", [0], token=9, baseline=0, ring_bytes=RING_BYTES))
    if release_after >= 0:
        asyncio.get_running_loop().call_later(release_after, lambda: [slot.close() for slot in held[:2]])
    got: list[Any] = []
    counted: list[str] = []
    writer: Any = SimpleNamespace(guard=got.append)
    page: Any = SimpleNamespace(inc=counted.append)
    ours, client = connected()
    response = facts()
    response.prompts[0] = type(response.prompts[0])(1, echo)
    with ours, client:
        await ResponseGuard(outbox, page).open(KeptConnection(ours), writer, response)
    return got, counted


@pytest.fixture
def outbox() -> Outbox:
    return Outbox(memoryview(bytearray(64 << 10)))


def test_it_is_refused_while_the_outbox_is_full(monkeypatch: pytest.MonkeyPatch, outbox: Outbox) -> None:
    monkeypatch.setattr(response_guard, "ROOM_WAIT", 0.1)
    with pytest.raises(Overloaded, match="try again"):
        asyncio.run(guarded(outbox))


def test_it_waits_for_others_to_leave(outbox: Outbox) -> None:
    got, counted = asyncio.run(guarded(outbox, release_after=0.05))
    assert len(got) == 1 and not counted


def test_one_that_can_never_have_room_goes_on_without(outbox: Outbox) -> None:
    got, counted = asyncio.run(guarded(outbox, echo="x" * (64 << 10)))
    assert got == [] and counted == ["responses_unguarded"]
