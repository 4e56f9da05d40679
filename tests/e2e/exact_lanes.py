"""Requests to the hash engine one after the other, of which each answer must be exact."""

from __future__ import annotations

from contextlib import closing
from threading import Event
from urllib.parse import urlsplit

from tests.e2e.daemon_process import Daemon
from tests.e2e.hash_engine import expected, request
from tests.e2e.raw_client import Client


def connect(daemon: Daemon, receive_buffer: int = 0) -> Client:
    url = urlsplit(daemon.url)
    assert url.hostname and url.port
    return Client((url.hostname, url.port), receive_buffer)


def stream(daemon: Daemon, lane: int, stop: Event, output: int) -> int:
    """Send one request of `output` tokens after the other until `stop`; return how many were answered."""
    done = 0
    while not stop.is_set():
        fields = request(1000 * lane + done, output=output)
        with closing(connect(daemon)) as client:
            client.send("/v1/completions", fields)
            answer = client.read()
        assert [entry["tokens"] for entry in answer.logprobs[0]] == expected(fields)
        assert answer.finishes[0] == ["length"]
        done += 1
    return done
