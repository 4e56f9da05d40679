"""HTTP requests to a running daemon over its admin socket, and the errors of `llumctl`."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TIMEOUT = 10.0  # seconds until an answer must begin
MAX_PATH = 107  # bytes in the path of a Unix socket
_BACKLOG_RETRY = 0.05  # seconds between two attempts to connect to a socket with a full backlog


class CtlError(Exception):
    """A command has failed. `code`: a stable word for scripts; `exit_code`: of the process."""

    exit_code = 1

    def __init__(self, message: str, code: str = "failed") -> None:
        super().__init__(message)
        self.code = code


class NotRunning(CtlError):
    """No daemon listens on the socket."""

    exit_code = 3

    def __init__(self, message: str) -> None:
        super().__init__(message, "not_running")


class Refused(CtlError):
    """The daemon answered with an error, or it cannot be asked."""

    def __init__(self, message: str, code: str = "refused") -> None:
        super().__init__(message, code)


class Lost(Refused):
    """The connection ended before the answer did: whether an order was taken is unknown."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "lost")


class NoAnswer(CtlError, TimeoutError):
    """The coordinator did not answer in time."""

    exit_code = 4

    def __init__(self, message: str) -> None:
        super().__init__(message, "no_answer")


def call(path: Path, method: str, route: str) -> dict[str, Any]:
    """Send one request to the admin socket `path` and return the JSON answer.

    Raises NotRunning, Refused or NoAnswer.
    """
    with _connect(path, TIMEOUT, lost=Lost) as connection:
        connection.request(method, route)
        return _body(connection.getresponse())


def read(path: Path, route: str) -> dict[str, Any]:
    """Return the JSON answer to a GET. Ask again while the coordinator is restarted, for up to TIMEOUT seconds.

    Raises NotRunning, Refused or NoAnswer.
    """
    end = time.monotonic() + TIMEOUT
    while True:
        try:
            return call(path, "GET", route)
        except Lost:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def stream(path: Path, route: str, timeout: float | None = TIMEOUT) -> Iterator[dict[str, Any]]:
    """Yield the rows of an answer that may have no end, until the coordinator closes it.

    `timeout`: seconds until the answer must begin, or None. Raises NotRunning, Refused or NoAnswer.
    """
    with _connect(path, timeout, lost=NotRunning) as connection:
        connection.request("GET", route)
        sock, response = connection.sock, connection.getresponse()
        if response.status >= 400:
            _body(response)
        sock.settimeout(None)
        with contextlib.suppress(http.client.HTTPException, ConnectionError):
            while (line := response.readline()).endswith(b"\n"):
                yield json.loads(line)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float | None) -> None:
        super().__init__("llumd", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        """Connect within the time-out. While the backlog is full the kernel refuses at once, so try again."""
        end = time.monotonic() + (self.timeout if self.timeout is not None else TIMEOUT)
        while True:
            self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.sock.settimeout(self.timeout)
            try:
                return self.sock.connect(str(self._path))
            except BlockingIOError:
                self.sock.close()
                if time.monotonic() > end:
                    raise TimeoutError from None
                time.sleep(_BACKLOG_RETRY)


@contextlib.contextmanager
def _connect(
    path: Path, timeout: float | None, lost: type[NotRunning] | type[Lost]
) -> Iterator[http.client.HTTPConnection]:
    """Open a connection and map its errors. `lost`: the error for a connection that ends before the answer does."""
    if len(bytes(path)) > MAX_PATH:
        raise Refused(f"the path of a socket may have at most {MAX_PATH} bytes; this is longer: {path}", "bad_socket")
    connection = _UnixConnection(path, timeout)
    try:
        yield connection
    except (FileNotFoundError, ConnectionRefusedError):
        hint = "--run-dir or --socket names another one"
        raise NotRunning(f"llumd is not running: no process listens on {path}; {hint}") from None
    except PermissionError:
        allowed = "its owner and its group have"
        raise Refused(f"you have no permission to use {path}; {allowed}", "no_permission") from None
    except TimeoutError:
        text = f"llumd runs, but its coordinator did not answer within {TIMEOUT:.0f} s: it starts or is busy"
        raise NoAnswer(f"{text}. An order may still take effect; `llumctl status` shows it") from None
    except (http.client.HTTPException, ConnectionError, json.JSONDecodeError, UnicodeDecodeError):
        why = "llumd is not running any more, its coordinator was restarted, or the socket is not llumd's"
        raise lost(f"the answer is incomplete: {why}") from None
    except OSError as e:
        raise Refused(f"cannot use {path}: {e.strerror or e}", "bad_socket") from None
    finally:
        connection.close()


def _body(response: http.client.HTTPResponse) -> dict[str, Any]:
    body = json.loads(response.read())
    if not isinstance(body, dict):
        raise http.client.HTTPException("the answer is no JSON object")
    if response.status >= 400:
        raise Refused(str(body.get("error", f"status {response.status}")), body.get("code", "refused"))
    return body
