"""Kept streams: clients hang up and go on where they were, at any time, at any frontend, and after its death."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import httpx
import pytest

from bench.answers import Answer
from tests.e2e.daemon_process import Daemon, wait_for
from tests.e2e.raw_client import Client
from tests.e2e.sse_reader import KEEP, Event, answer_of, begun, id_of, last_id, resumed
from tests.e2e.test_succession import CHAT, MESSAGES, REQUESTS, TEXT, address, body, kill

STREAMS = [name for name, (_, fields) in REQUESTS.items() if fields["stream"]]


@pytest.fixture(scope="module")
def daemon(start_shared) -> Iterator[Daemon]:
    # Without prefix caching a request counts as many cached tokens the second time as the first time.
    return start_shared("--devices", "cpu,cpu", "--no-prefix-caching", "--stub-step", "0.01", engine="hash")


def unkept(daemon: Daemon, name: str) -> Answer:
    path, fields = REQUESTS[name]
    with closing(Client(address(daemon))) as client:
        client.send(path, fields)
        answer = client.read()
    answer.ids = set()
    return answer


def rest_of(daemon: Daemon, first: list[Event], *, header: bool = True) -> list[Event]:
    with resumed(daemon.url, id_of(first), last_id(first), header=header) as reader:
        assert reader.response.status_code == 200
        return reader.rest()


def test_a_stream_that_has_ended_can_be_read_from_each_event(daemon: Daemon):
    def check(name: str) -> None:
        path, fields = REQUESTS[name]
        whole = unkept(daemon, name)
        with begun(daemon.url + path, fields) as reader:
            events = reader.rest()
            assert reader.response.headers["X-Llumd-Stream"] == id_of(events)
        assert answer_of(events) == whole, name
        ids = [event.id for event in events]
        assert all(ids[:-1]) and len(set(ids)) == len(ids) and not ids[-1], name
        for count in {1, 2, 3, len(events) // 2, len(events) - 3, len(events) - 2, len(events) - 1}:
            first = events[:count]
            assert answer_of(first + rest_of(daemon, first, header=count % 2 == 0)) == whole, (name, count)
        with resumed(daemon.url, id_of(events)) as reader:
            assert answer_of(reader.rest()) == whole, name

    with ThreadPoolExecutor(len(STREAMS)) as pool:
        list(pool.map(check, STREAMS))


def test_a_stream_goes_on_after_its_client_has_hung_up(daemon: Daemon):
    def check(name: str, count: int) -> None:
        path, fields = REQUESTS[name]
        whole = unkept(daemon, name)
        with begun(daemon.url + path, fields) as reader:
            got = reader.read(count)
        time.sleep(0.2)  # tokens that no client reads
        with resumed(daemon.url, id_of(got), last_id(got)) as reader:
            got += reader.read(3)
        if got[-1].data is not None:
            got += rest_of(daemon, got)
        assert answer_of(got) == whole, (name, count)

    with ThreadPoolExecutor(len(STREAMS)) as pool:
        list(pool.map(check, STREAMS, range(1, 1 + 4 * len(STREAMS), 4)))


@pytest.mark.parametrize("connected", [False, True])
def test_a_kept_stream_outlives_the_frontend(daemon: Daemon, connected: bool):
    cut = daemon.metric("llumd:responses_cut_total")
    whole = {name: unkept(daemon, name) for name in ("text", "stop strings", "chat logprobs")}
    readers = {name: begun(daemon.url + REQUESTS[name][0], REQUESTS[name][1]) for name in whole}
    got = {}
    with ThreadPoolExecutor() as pool:
        opened = {name: context.__enter__() for name, context in readers.items()}
        got = {name: reader.read(5) for name, reader in opened.items()}
        if connected:
            rest = {name: pool.submit(reader.rest) for name, reader in opened.items()}
            kill(daemon)
            for name, events in got.items():
                assert answer_of(events + rest[name].result()) == whole[name]
        for context in readers.values():
            context.__exit__(None, None, None)
        if not connected:
            kill(daemon)
    for name, events in got.items():
        assert answer_of(events + rest_of(daemon, events)) == whole[name]
    kill(daemon)
    for name, events in got.items():  # all have ended
        assert answer_of(events + rest_of(daemon, events)) == whole[name]
    assert daemon.metric("llumd:responses_cut_total") == cut
    assert daemon.metric("llumd:frontend_streams_kept") >= 3


def test_a_client_can_cancel_its_stream(daemon: Daemon):
    daemon.await_idle()
    with begun(daemon.url + TEXT, body(60, max_tokens=4000)) as reader:
        got = reader.read(2)
        url = f"{daemon.url}/v1/streams/{id_of(got)}"
        assert httpx.delete(url).json() == {"id": id_of(got), "object": "stream", "deleted": True}
        end = reader.rest()[-1].data
    assert end is not None and end["error"]["code"] == "cancelled"
    with begun(daemon.url + TEXT, body(61, max_tokens=4000)) as reader:
        got = reader.read(2)
    assert httpx.delete(f"{daemon.url}/v1/streams/{id_of(got)}").status_code == 200
    daemon.await_idle()
    for method in ("GET", "DELETE"):
        found = httpx.request(method, url)
        assert (found.status_code, found.json()["error"]["code"]) == (404, "stream_not_found")


def test_without_the_header_a_hang_up_cancels(daemon: Daemon):
    daemon.await_idle()
    with begun(daemon.url + TEXT, body(62, max_tokens=4000), {}) as reader:
        got = reader.read(3)
        assert not any(event.id for event in got)
    daemon.await_idle()
    with resumed(daemon.url, id_of(got)) as reader:
        assert reader.response.status_code == 404


def test_a_new_reader_takes_the_stream_over(daemon: Daemon):
    whole = unkept(daemon, "text")
    with begun(daemon.url + TEXT, REQUESTS["text"][1]) as first:
        got = first.read(3)
        assert answer_of(got + rest_of(daemon, got)) == whole
        with pytest.raises(httpx.TransportError):
            first.rest()


def test_only_the_key_of_a_stream_reads_it(start, home):
    keys = home / "keys"
    keys.write_text("sk-one\nsk-two\nsk-three tenant=shop\nsk-four tenant=shop\n")
    daemon = start("--devices", "cpu", "--api-key-file", str(keys), "--max-model-len", "64", key="sk-one")
    fields = {"prompt": "a", "max_tokens": 5, "stream": True, "ignore_eos": True}

    def read(id: str, key: str) -> int:
        return httpx.get(f"{daemon.url}/v1/streams/{id}", headers={"Authorization": f"Bearer {key}"}).status_code

    for owner, allowed in (("sk-one", {"sk-one"}), ("sk-three", {"sk-three", "sk-four"})):
        with begun(f"{daemon.url}{TEXT}", fields, KEEP | {"Authorization": f"Bearer {owner}"}) as reader:
            id = id_of(reader.rest())
        keys_of = ("sk-one", "sk-two", "sk-three", "sk-four")
        assert {key for key in keys_of if read(id, key) == 200} == allowed
        assert httpx.get(f"{daemon.url}/v1/streams/{id}").status_code == 401


@pytest.fixture(scope="module")
def pair(start_shared) -> Iterator[Daemon]:
    return start_shared(
        "--devices", "cpu", "--frontends", "2", "--no-prefix-caching", "--stub-step", "0.01", engine="hash"
    )


def test_each_frontend_finds_the_streams_of_the_other(pair: Daemon):
    """A connection that lands at the wrong frontend is passed on, and counts as accepted twice."""
    fields = body(70, max_tokens=150, n=2)
    with closing(Client(address(pair))) as client:
        client.send(TEXT, fields)
        whole = client.read()
    whole.ids = set()

    def run(_: int) -> int:
        with begun(pair.url + TEXT, fields) as reader:
            got = reader.read(2)
        connections = 1
        while got[-1].data is not None:
            with resumed(pair.url, id_of(got), last_id(got)) as reader:
                got += reader.read(60)
            connections += 1
        assert answer_of(got) == whole
        return connections

    before = pair.metric("llumd:connections_accepted_total")
    with ThreadPoolExecutor(8) as pool:
        connections = sum(pool.map(run, range(8)))
    assert pair.metric("llumd:connections_accepted_total") > before + connections + 1


def test_a_stream_is_passed_on_to_the_successor_of_its_frontend(pair: Daemon):
    fields: dict[str, Any] = body(71, max_tokens=100, messages=MESSAGES)
    with closing(Client(address(pair))) as client:
        client.send(CHAT, fields)
        whole = client.read()
    whole.ids = set()
    started = []
    for _ in range(6):
        with begun(pair.url + CHAT, fields) as reader:
            started.append(reader.read(2))
    before = [pair.kill("frontend", i) for i in range(2)]
    with ThreadPoolExecutor(6) as pool:  # some connections are made before a frontend serves again

        def rest(got: list[Event]) -> Answer:
            def attempt() -> list[Event] | None:
                try:
                    return rest_of(pair, got)
                except httpx.TransportError:
                    return None

            return answer_of(got + wait_for("the rest", attempt, 60))

        assert all(answer == whole for answer in pool.map(rest, started))
    for i, row in enumerate(before):
        pair.await_successor("frontend", i, row)


def sent_once(daemon: Daemon, key: str, fields: dict[str, Any]) -> tuple[str, str]:
    """Send a request with this `Idempotency-Key` until it is answered. Return the id of the answer, and its text."""

    def attempt() -> tuple[str, str] | None:
        try:
            found = httpx.post(daemon.url + TEXT, json=fields, headers={"Idempotency-Key": key}, timeout=60)
        except httpx.TransportError:
            return None
        if found.status_code == 503:  # its frontend is being replaced
            return None
        assert found.status_code == 200, found.text
        lines = [line.removeprefix("data: ") for line in found.text.splitlines()]
        answers = [json.loads(line) for line in lines if line.startswith("{")]
        assert answers[-1]["choices"][0]["finish_reason"] == "length"
        return answers[0]["id"], "".join(answer["choices"][0]["text"] for answer in answers)

    return wait_for("an answer", attempt, 60)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_is_sent_again_runs_once_at_whichever_frontend(pair: Daemon, stream: bool):
    pair.await_idle()
    fields = body(80, max_tokens=60, stream=stream, user="x" * 300_000)  # more than a message holds
    before = pair.metric("vllm:generation_tokens_total")
    with ThreadPoolExecutor(8) as pool:  # at once, unless they are streams: a stream has one reader
        run = map if stream else pool.map
        answers = list(run(lambda i: sent_once(pair, f"{stream}-{i % 2}", fields), range(8)))
    assert len({id for id, _ in answers}) == 2 and len({text for _, text in answers}) == 1
    assert pair.metric("vllm:generation_tokens_total") == before + 2 * 60


def test_a_request_that_is_sent_again_outlives_its_frontend(pair: Daemon):
    pair.await_idle()
    keys = [f"over-a-death-{i}" for i in range(6)]
    requests = {key: body(90 + i, max_tokens=150, stream=i % 2 == 0) for i, key in enumerate(keys)}
    before = pair.metric("vllm:generation_tokens_total")
    with ThreadPoolExecutor(len(keys)) as pool:
        running = {key: pool.submit(sent_once, pair, key, fields) for key, fields in requests.items()}
        wait_for("all of them at work", lambda: pair.metric("vllm:num_requests_running") >= len(keys))
        rows = [pair.kill("frontend", i) for i in range(2)]
        first = {key: future.result() for key, future in running.items()}
        for i, row in enumerate(rows):
            pair.await_successor("frontend", i, row)
        again = dict(zip(keys, pool.map(lambda key: sent_once(pair, key, requests[key]), keys), strict=True))
    assert again == first
    # What an engine has made while no frontend served is not counted.
    assert pair.metric("vllm:generation_tokens_total") <= before + 150 * len(keys)
