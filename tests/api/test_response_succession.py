"""Responses that a successor goes on with: what happens if their clients have hung up meanwhile."""

from __future__ import annotations

import asyncio
import socket
import struct
from types import SimpleNamespace
from typing import Any

import pytest

from daemon.api.response_facts import AnswerForm, PromptFacts, ResponseFacts, encode_facts
from daemon.api.succession import Succession
from daemon.config import Config
from daemon.enums import EarlyEnd
from daemon.ipc.kept_sockets import bytes_taken
from daemon.ipc.outbox import Outbox

TOKEN, SLOT, RID = 7, 3, 99


class Request:
    """A request of the former process that never ends by itself."""

    rid = RID

    def __init__(self) -> None:
        self.cancelled: list[EarlyEnd | None] = []
        self.released = 0

    def cancel(self, why: EarlyEnd | None = None) -> None:
        self.cancelled.append(why)

    def release(self) -> None:
        self.released += 1


def facts() -> ResponseFacts:
    form = AnswerForm("completion", True, 1, (), 0, frozenset(), True, -1, False, False, False)
    start = {"id": "a", "created": 1, "arrival": 0.0, "form": form, "prompts": [PromptFacts(1, "")]}
    rest = {"slots": [SLOT], "rids": [RID], "minor": 1, "head_sent": False, "headers": {}, "client": ""}
    return ResponseFacts(**start, **rest, method="POST", path="/v1/completions", request_id="x")


def connected() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        return server.accept()[0], client


def hang_up(client: socket.socket, *, reset: bool) -> None:
    if reset:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize("moment", ["before", "while it is adopted", "after"])
def test_a_client_that_hangs_up_at_any_moment_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, moment: str, reset: bool
) -> None:
    asyncio.run(_hang_up_at(monkeypatch, moment, reset))


async def _hang_up_at(monkeypatch: pytest.MonkeyPatch, moment: str, reset: bool) -> None:
    ours, client = connected()
    if moment == "before":
        hang_up(client, reset=reset)
        await asyncio.sleep(0.05)
    outbox, request, released = Outbox(memoryview(bytearray(1 << 20))), Request(), []
    slot = outbox.open(
        encode_facts(facts()), [0, 0], token=TOKEN, baseline=bytes_taken(ours) or 0, ring_bytes=1 << 14
    )
    slot.commit(b"the bytes that the client still needs", [0, 0])
    tracker = SimpleNamespace(adopted=lambda: {SLOT: request}, abandon_unclaimed=lambda claimed: None)
    kept = SimpleNamespace(adopt=lambda: {TOKEN: ours}, release=released.append)
    page = SimpleNamespace(inc=lambda *_: None)
    streams = SimpleNamespace(get=lambda id: None, settle=lambda: None)
    service: Any = SimpleNamespace(config=Config(), page=page, kept=streams)
    connections: Any = SimpleNamespace(opened=lambda c: None, closed=lambda c: None)
    succession = Succession(service, tracker, outbox, kept, connections)
    adopt = succession._adopt

    async def adopt_slowly(*args: Any) -> Any:
        found = await adopt(*args)
        if moment == "while it is adopted":
            hang_up(client, reset=reset)
            await asyncio.sleep(0.05)
        return found

    monkeypatch.setattr(succession, "_adopt", adopt_slowly)
    monkeypatch.setattr(succession, "_respond", lambda found: asyncio.sleep(60))
    await succession.start()
    if moment == "after":
        hang_up(client, reset=reset)  # it may reach the loop before the first step of the response's task
    async with asyncio.timeout(5):
        while succession._tasks:
            await asyncio.sleep(0.01)
    assert request.cancelled[0] is EarlyEnd.CLIENT and request.released
    assert outbox.slots() == []
    assert released == [TOKEN]
