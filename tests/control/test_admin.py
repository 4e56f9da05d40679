"""The admin API: the answers to orders, and the events that they leave."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from daemon.config import Config
from daemon.control.admin import build_admin
from daemon.control.desired_states import DesiredStates
from daemon.control.key_order import KeyOrder
from daemon.control.rebalancer import Rebalancer
from daemon.control.request_orders import RequestOrders
from daemon.control.restart_order import OTHER_LAYOUT, RestartOrder
from daemon.control.status import StatusReader
from daemon.enums import MigrationMode
from daemon.ipc.child import ChildSpec
from daemon.ipc.code_version import CodeVersion
from daemon.ipc.event_ring import EventWriter
from daemon.ipc.fabric import COORDINATOR, Fabric, FabricHandles
from daemon.ipc.journal import Journal
from daemon.ipc.keys_page import KeysOutcome, KeysWriter
from daemon.ipc.messages import (
    CancelRequest,
    PoolState,
    RequestParams,
    SamplingParams,
    SetPriority,
    decode_from_coordinator,
    decode_to_llumlet,
    encode,
)
from daemon.ipc.model_text import text_digest
from daemon.ipc.process_table import ProcessFacts, ProcessState
from daemon.ipc.restart_orders import RestartOrders
from daemon.ipc.ring import RingReader
from tests.control.factories import engine_facts

Send = Callable[..., tuple[int, dict[str, Any]]]
BY = f"uid {os.getuid()} (pid {os.getpid()})"


@pytest.fixture
def send(handles: FabricHandles, tmp_path: Path) -> Send:
    """Send one request to the admin API of a daemon with two serving engines and one dead engine."""
    topology = handles.topology
    table = Fabric(handles, -1, 0).table_writer()
    for process in range(topology.processes):
        table.publish(process, ProcessFacts(state=ProcessState.UP, incarnation=1))
    for i in range(2):
        Fabric(handles, topology.engine(i), 1).board().publish(encode(engine_facts()))
    config = Config(devices=["cpu"] * 3)
    fabric = Fabric(handles, COORDINATOR, 1)
    events = EventWriter(fabric.events(COORDINATOR))
    spec = ChildSpec(config, handles, COORDINATOR, 1, os.getpid(), "")
    status = StatusReader(fabric, spec)
    rebalancer, desired_states = Rebalancer(fabric, config, events), DesiredStates(fabric, events)
    key_order, restart_order = KeyOrder(fabric, timeout=0.5), RestartOrder(fabric, spec)
    app_parts = RequestOrders(fabric, status), rebalancer, desired_states, key_order, restart_order
    socket = str(tmp_path / "admin.sock")

    async def exchange(method: str, path: str, headers: dict[str, str]) -> tuple[int, dict[str, Any]]:
        runner = web.AppRunner(build_admin(status, *app_parts, events))
        await runner.setup()
        await web.UnixSite(runner, socket).start()
        async with (
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(socket)) as session,
            session.request(method, f"http://llumd{path}", headers=headers) as response,
        ):
            answer = response.status, await response.json()
        await runner.cleanup()
        return answer

    def send(method: str, path: str, **headers: str) -> tuple[int, dict[str, Any]]:
        return asyncio.run(exchange(method, path, headers))

    send.restart_order = restart_order  # type: ignore[attr-defined]
    send.history = status.event_history()  # type: ignore[attr-defined]
    return send


def orders(send: Send) -> list[tuple[str, str, int, str, str]]:
    """Return action, request, engine, detail and author of each order since the last call."""
    rows = send.history.read()  # type: ignore[attr-defined]
    return [(row["action"], row["request"], row["engine"], row["detail"], row["by"]) for row in rows]


def received(ring: RingReader, decode: Callable[[bytes], Any]) -> list[Any]:
    """Return the messages in a ring."""
    messages = []
    while (record := ring.read()) is not None:
        messages.append(decode(record.payload))
    return messages


@pytest.mark.parametrize(
    ("verb", "state"), [("drain", "draining"), ("undrain", "serving"), ("park", "parked"), ("wake", "serving")]
)
def test_an_order_to_an_engine_sets_its_desired_state_and_writes_one_event(send: Send, verb: str, state: str):
    assert send("POST", f"/v1/engines/1/{verb}") == (200, {"engine": 1, "desired": state, "wished": state})
    assert orders(send) == [(verb, "", 1, "", BY)]
    row = send("GET", "/v1/status")[1]["engines"][1]
    assert row["desired"] == row["wished"] == state
    assert orders(send) == []


def test_an_order_about_a_request_is_sent_to_its_frontend_or_engine(send: Send, handles: FabricHandles):
    topology = handles.topology
    frontend, source = Fabric(handles, topology.frontend(0), 1), Fabric(handles, topology.engine(0), 1)
    journal = Journal(frontend.journal(0, writable=True))
    params = RequestParams(SamplingParams(max_tokens=9, seed=1), time.monotonic(), label="cmpl-1-0")
    journal.assign(journal.open(5, params, [1, 2, 3]), 1, 0, 1)

    assert send("POST", "/v1/requests/cmpl-1/priority/high") == (200, {"changed": ["cmpl-1-0"], "priority": -1})
    assert send("DELETE", "/v1/requests/cmpl-1") == (200, {"cancelled": ["cmpl-1-0"]})
    moved = {"ordered": ["cmpl-1-0"], "engine": 1}
    assert send("POST", "/v1/requests/cmpl-1/migrate/1") == (200, moved)
    assert send("POST", "/v1/requests/cmpl-1/migrate/1?how=blocking") == (200, moved)
    assert send("POST", "/v1/requests/cmpl-1/migrate/1?how=teleport")[0] == 409
    assert orders(send) == [
        ("priority", "cmpl-1", -1, "high", BY),
        ("cancel", "cmpl-1", -1, "", BY),
        ("migrate", "cmpl-1", 1, "", BY),
        ("migrate", "cmpl-1", 1, "blocking", BY),
    ]
    assert received(frontend.reader(COORDINATOR), decode_from_coordinator) == [SetPriority(5, -1), CancelRequest(5)]
    moves = received(source.reader(COORDINATOR), decode_to_llumlet)
    assert [(m.engine, m.rid, m.how) for m in moves] == [(1, 5, "live"), (1, 5, "blocking")]


def test_a_refused_order_writes_no_event(send: Send):
    no_engine = {"error": "there is no engine 7; `llumctl status` lists them", "code": "not_found"}
    assert send("POST", "/v1/engines/7/drain") == (409, no_engine)
    unknown = {"error": "no unfinished request is called 'cmpl-1'", "code": "not_found"}
    assert send("DELETE", "/v1/requests/cmpl-1") == (404, unknown)
    assert send("POST", "/v1/requests/cmpl-1/priority/high") == (404, unknown)
    assert send("POST", "/v1/requests/cmpl-1/migrate/1") == (409, unknown)
    status, answer = send("POST", "/v1/requests/cmpl-1/priority/urgent")
    assert status == 409 and "high, normal, low or a whole number" in answer["error"]
    assert answer["code"] == "refused"
    assert orders(send) == []


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "not_found"),
        ("DELETE", "/v1/requests/", 404, "not_found"),
        ("POST", f"/v1/engines/{'9' * 20}/drain", 404, "not_found"),
        ("PUT", "/v1/status", 405, "bad_request"),
        ("GET", "/v1/events?since=yesterday", 400, "bad_request"),
    ],
)
def test_every_error_is_json_with_a_code(send: Send, method: str, path: str, status: int, code: str):
    answer = send(method, path)
    assert (answer[0], answer[1]["code"]) == (status, code)
    assert answer[1]["error"]


def test_an_unexpected_failure_is_json_and_goes_to_the_log(
    send: Send, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def broken(_: StatusReader) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr(StatusReader, "config", broken)
    answer = send("GET", "/v1/config")
    assert (answer[0], answer[1]["code"]) == (500, "internal")
    assert "a fault" in caplog.text and "a fault" not in answer[1]["error"]


def test_an_engine_that_is_down_can_be_parked_because_others_serve(send: Send):
    assert send("POST", "/v1/engines/2/park")[0] == 200
    assert send("GET", "/v1/status")[1]["engines"][2]["desired"] == "parked"


def test_choices_that_are_there_already_do_not_keep_the_others_from_moving(send: Send, handles: FabricHandles):
    frontend = Fabric(handles, handles.topology.frontend(0), 1)
    journal = Journal(frontend.journal(0, writable=True))
    for i in range(2):
        params = RequestParams(SamplingParams(max_tokens=9, seed=1), time.monotonic(), label=f"cmpl-1-{i}")
        journal.assign(journal.open(5 + i, params, [1, 2, 3]), 1, i, 1)
    assert send("POST", "/v1/requests/cmpl-1/migrate/0") == (200, {"ordered": ["cmpl-1-1"], "engine": 0})
    status, answer = send("POST", "/v1/requests/cmpl-1-0/migrate/0")
    assert status == 409 and "on engine 0 already" in answer["error"]


@pytest.mark.parametrize(
    ("state", "reason"),
    [(PoolState.NOT_OPEN, "has not opened the KV pool"), (PoolState.FAILED, "cannot open the KV pool")],
)
def test_a_request_is_not_moved_to_an_engine_whose_pool_is_not_open(
    send: Send, handles: FabricHandles, state: PoolState, reason: str
):
    frontend = Fabric(handles, handles.topology.frontend(0), 1)
    journal = Journal(frontend.journal(0, writable=True))
    params = RequestParams(SamplingParams(max_tokens=9, seed=1), time.monotonic(), label="cmpl-1-0")
    journal.assign(journal.open(5, params, [1, 2, 3]), 1, 0, 1)
    facts = engine_facts(peer_pools=bytes((0, state, 0)))
    Fabric(handles, handles.topology.engine(0), 1).board().publish(encode(facts))
    status, answer = send("POST", "/v1/requests/cmpl-1/migrate/1")
    assert (status, answer["code"]) == (409, "refused")
    assert reason in answer["error"] and "--how recompute" in answer["error"]
    assert orders(send) == []
    assert send("POST", "/v1/requests/cmpl-1/migrate/1?how=recompute")[0] == 200
    rows = send("GET", "/v1/status")[1]["engines"]
    assert rows[0]["peer_pools"] == {"1": state.name.lower(), "2": "not_open"}
    assert "peer_pools" not in rows[2]


def test_a_daemon_that_shuts_down_says_so_and_takes_no_orders_about_engines(send: Send, handles: FabricHandles):
    frontend = Fabric(handles, handles.topology.frontend(0), 1)
    journal = Journal(frontend.journal(0, writable=True))
    params = RequestParams(SamplingParams(max_tokens=9, seed=1), time.monotonic(), label="cmpl-1-0")
    journal.assign(journal.open(5, params, [1, 2, 3]), 1, 0, 1)
    assert send("GET", "/v1/status")[1]["shutdown"] is None
    Fabric(handles, -1, 0).shutdown().begin(time.monotonic() + 30.0)
    status = send("GET", "/v1/status")[1]
    assert status["state"] == "draining"
    assert status["shutdown"]["requests"] == 1
    assert 25 < status["shutdown"]["seconds_left"] <= 30
    for verb in ("drain", "wake"):
        assert send("POST", f"/v1/engines/1/{verb}")[1]["code"] == "shutting_down"
    assert send("DELETE", "/v1/requests/cmpl-1")[0] == 200  # an operator may still end a request


def test_a_request_from_a_browser_is_refused(send: Send):
    answer = send("POST", "/v1/engines/1/drain", Origin="http://example.org")
    assert answer == (403, {"error": "requests from browsers are refused", "code": "forbidden"})
    assert orders(send) == []


def test_a_reload_without_a_key_file_is_refused(send: Send):
    status, body = send("POST", "/v1/reload")
    assert (status, orders(send)) == (409, [])
    assert "api_key_file is not set" in body["error"]
    assert send("GET", "/v1/status")[1]["keys"] is None


def test_a_reload_waits_for_the_supervisor(send: Send, handles: FabricHandles):
    page = KeysWriter(Fabric(handles, -1, 0).keys_page())
    page.report(KeysOutcome(0, keys=2, tenants=1, added=2))
    status, body = send("POST", "/v1/reload")
    assert (status, orders(send)) == (409, [])
    assert "the supervisor does not answer" in body["error"]

    page.report(KeysOutcome(2, keys=3, tenants=1, added=1))
    counts = {"keys": 3, "tenants": 1, "added": 1, "removed": 0, "changed": 0}
    assert send("POST", "/v1/reload") == (200, counts)
    assert send("GET", "/v1/status")[1]["keys"] == {"accepted": 3, "tenants": 1, "error": ""}
    error = f"api_key_file: line 4 of /{900 * 'x'}"  # longer than an event may be
    page.report(KeysOutcome(3, keys=3, tenants=1, error=error))
    assert send("POST", "/v1/reload") == (
        409,
        {"error": f"{error}; the 3 former keys stay accepted", "code": "refused"},
    )
    done, failed = orders(send)
    assert (done, failed[:3]) == (("reload", "", -1, "", BY), ("reload", "", -1))
    assert failed[3].startswith("api_key_file: line 4")
    assert send("GET", "/v1/status")[1]["keys"]["error"] == error


@pytest.mark.parametrize(
    ("path", "process", "event"),
    [
        ("/v1/engines/1/restart", "engine 1", 1),
        ("/v1/frontends/0/restart", "frontend 0", -1),
        ("/v1/coordinator/restart", "coordinator", -1),
    ],
)
def test_a_restart_is_ordered_of_the_supervisor(
    send: Send, handles: FabricHandles, path: str, process: str, event: int
):
    assert send("POST", path) == (200, {"process": process, "incarnation": 1})
    assert orders(send) == [("restart", "", event, process, BY)]
    words = RestartOrders(Fabric(handles, -1, 0).restart_orders())
    names = [handles.topology.name(p) for p in range(handles.topology.processes)]
    assert [names[p] for p in range(len(names)) if words.of(p) == 1] == [process]


def test_restarts_that_are_refused(send: Send, handles: FabricHandles, monkeypatch: pytest.MonkeyPatch):
    assert send("POST", "/v1/engines/3/restart")[0] == send("POST", "/v1/frontends/-1/restart")[0] == 409
    Fabric(handles, -1, 0).table_writer().publish(1, ProcessFacts(state=ProcessState.DEAD, incarnation=1))
    assert "frontend 0 does not run now" in send("POST", "/v1/frontends/0/restart")[1]["error"]
    monkeypatch.setattr(send.restart_order, "_version", CodeVersion("another", "another"))  # type: ignore[attr-defined]
    answer = send("POST", "/v1/engines/1/restart")[1]
    assert answer["code"] == OTHER_LAYOUT
    assert "restart the whole daemon" in answer["error"]
    Fabric(handles, -1, 0).shutdown().begin(time.monotonic() + 30.0)
    assert send("POST", "/v1/engines/1/restart")[1]["code"] == "shutting_down"
    assert orders(send) == []


def test_a_request_is_not_moved_to_other_weights(send: Send, handles: FabricHandles):
    topology = handles.topology
    journal = Journal(Fabric(handles, topology.frontend(0), 1).journal(0, writable=True))
    params = RequestParams(SamplingParams(max_tokens=9, seed=1), time.monotonic(), label="cmpl-1-0")
    journal.assign(journal.open(5, params, [1, 2, 3]), 1, 0, 1)
    board = Fabric(handles, topology.engine(1), 1).board()
    board.publish(encode(engine_facts(weights=7, fingerprint=7)))
    for how in MigrationMode:
        status, answer = send("POST", f"/v1/requests/cmpl-1/migrate/1?how={how}")
        assert (status, answer["code"]) == (409, "other_weights")
    assert "a request ends on the weights it began with" in answer["error"]
    board.publish(encode(engine_facts(fingerprint=7)))  # the same weights, other KV
    assert "--how recompute" in send("POST", "/v1/requests/cmpl-1/migrate/1")[1]["error"]
    assert send("POST", "/v1/requests/cmpl-1/migrate/1?how=recompute")[0] == 200
    rows = send("GET", "/v1/status")[1]["engines"]
    assert [row["fingerprint"] for row in rows[:2]] == ["0" * 16, "0" * 15 + "7"]


def test_no_process_restarts_over_changed_text_files_of_the_model(
    send: Send, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "config.json").write_text("{}")
    order = send.restart_order  # type: ignore[attr-defined]
    spec = dataclasses.replace(order._spec, model_dir=str(tmp_path), model_text=text_digest(str(tmp_path)))
    monkeypatch.setattr(order, "_spec", spec)
    (tmp_path / "model.safetensors").write_text("other weights")
    assert send("POST", "/v1/engines/1/restart")[0] == 200
    (tmp_path / "tokenizer.json").write_text("{}")
    for path in ("/v1/engines/1/restart", "/v1/frontends/0/restart"):
        status, answer = send("POST", path)
        assert (status, answer["code"]) == (409, "other_model")
        assert "tokenizer" in answer["error"] and "restart the whole daemon" in answer["error"]
    assert send("POST", "/v1/coordinator/restart")[0] == 200
