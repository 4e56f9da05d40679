"""HTTP requests to a running daemon over its admin socket."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TIMEOUT = 10.0  # seconds until an answer must begin


class NotRunning(Exception):
    """No daemon listens on the socket."""


class Refused(Exception):
    """The daemon answered with an error, or its answer is incomplete."""


def call(path: Path, method: str, route: str) -> dict[str, Any]:
    """Send one request to the admin socket `path` and return the JSON answer.

    Raises NotRunning, Refused or TimeoutError.
    """
    with _connect(path, TIMEOUT, lost=Refused) as connection:
        connection.request(method, route)
        return _body(connection.getresponse())


def stream(path: Path, route: str, timeout: float | None = TIMEOUT) -> Iterator[dict[str, Any]]:
    """Yield the rows of an answer that may have no end, until the coordinator closes it.

    `timeout`: seconds until the answer must begin, or None. Raises NotRunning, Refused or TimeoutError.
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
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


@contextlib.contextmanager
def _connect(
    path: Path, timeout: float | None, lost: type[NotRunning] | type[Refused]
) -> Iterator[http.client.HTTPConnection]:
    """Open a connection and map its errors. `lost`: the error for a connection that ends before the answer does."""
    connection = _UnixConnection(path, timeout)
    try:
        yield connection
    except (FileNotFoundError, ConnectionRefusedError):
        raise NotRunning(f"llumd is not running (no process listens on {path})") from None
    except PermissionError:
        raise Refused(f"you have no permission to use {path}; its owner and its group have") from None
    except (http.client.HTTPException, ConnectionError, ValueError) as e:
        why = "llumd is not running any more, or its coordinator was restarted"
        raise lost(f"the answer is incomplete ({e}): {why}") from None
    finally:
        connection.close()


def _body(response: http.client.HTTPResponse) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(response.read())
    if response.status >= 400:
        raise Refused(body.get("error", f"status {response.status}"))
    return body
