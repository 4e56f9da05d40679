"""The client of the admin socket: answers and errors, against a server that sends fixed bytes."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from daemon.cli.admin_client import NotRunning, Refused, call, stream

Serve = Callable[[bytes], Path]
OK = b"HTTP/1.1 200 OK\r\n"


@pytest.fixture
def serve(tmp_path: Path) -> Serve:
    """Start a server that reads one request, sends the given bytes and closes the connection."""

    def start(answer: bytes) -> Path:
        path = tmp_path / "admin.sock"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(path))
        listener.listen()

        def run() -> None:
            with listener, listener.accept()[0] as connection:
                connection.recv(1 << 16)
                connection.sendall(answer)

        threading.Thread(target=run, daemon=True).start()
        return path

    return start


def test_an_answer_is_returned(serve: Serve):
    assert call(serve(OK + b'Content-Length: 8\r\n\r\n{"a": 1}'), "GET", "/") == {"a": 1}


def test_an_error_answer_raises_refused(serve: Serve):
    path = serve(b"HTTP/1.1 409 Conflict\r\nContent-Length: 19\r\n\r\n" + b'{"error": "parked"}')
    with pytest.raises(Refused, match=r"^parked$"):
        call(path, "POST", "/")


@pytest.mark.parametrize(
    "answer", [b"", OK, OK + b"Content-Length: 80\r\n\r\n{", OK + b"Content-Length: 2\r\n\r\n{x"]
)
def test_an_incomplete_answer_raises_refused(serve: Serve, answer: bytes):
    with pytest.raises(Refused, match="the answer is incomplete"):
        call(serve(answer), "GET", "/")


def test_without_a_socket_no_daemon_is_running(tmp_path: Path):
    with pytest.raises(NotRunning, match="not running"):
        call(tmp_path / "admin.sock", "GET", "/")
    socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).bind(str(tmp_path / "left.sock"))
    with pytest.raises(NotRunning, match="not running"):
        call(tmp_path / "left.sock", "GET", "/")


def test_a_stream_ends_where_the_answer_breaks_off(serve: Serve):
    path = serve(OK + b'\r\n{"a": 1}\n{"a": 2}\n{"a"')
    assert list(stream(path, "/")) == [{"a": 1}, {"a": 2}]


def test_a_stream_without_an_answer_raises_not_running(serve: Serve):
    with pytest.raises(NotRunning, match="not running"):
        list(stream(serve(b""), "/"))
