"""A client that reads the bytes of one response and checks their form strictly."""

from __future__ import annotations

import json
import socket
from typing import Any

from bench.answers import Answer, Broken, read_body, read_events

TIMEOUT = 60.0  # seconds without a byte


class Client:
    """One connection. `received` counts the bytes of the response that is being read."""

    def __init__(self, address: tuple[str, int], receive_buffer: int = 0) -> None:
        self.sock = socket.socket()
        if receive_buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.settimeout(TIMEOUT)
        self.sock.connect(address)
        self._buffer = b""
        self.received = 0

    def close(self) -> None:
        self.sock.close()

    def send(self, path: str, body: dict[str, Any], *, version: str = "1.1", headers: str = "") -> None:
        """Send a request. `headers`: more lines, each with its line break."""
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/{version}\r\nHost: localhost\r\nContent-Type: application/json\r\n{headers}"
        self.sock.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        self.received = len(self._buffer)

    def read(self) -> Answer:
        """Read one response to its end. Raises Broken."""
        head = self._until(b"\r\n\r\n").decode()
        status = int(head.split()[1])
        fields = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if line)
        if fields.get("transfer-encoding") == "chunked":
            body = self._chunks()
        elif "content-length" in fields:
            body = self._exactly(int(fields["content-length"]))
        else:
            body = self._to_the_end()
        if fields["content-type"].startswith("text/event-stream"):
            return read_events(status, body)
        return read_body(status, json.loads(body))

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self._until(b"\r\n"), 16):
            body += self._exactly(size)
            if self._exactly(2) != b"\r\n":
                raise Broken("a chunk does not end where it should")
        if self._exactly(2) != b"\r\n":
            raise Broken("the last chunk does not end")
        return body

    def _more(self) -> None:
        try:
            data = self.sock.recv(1 << 16)
        except OSError as e:
            raise Broken(f"{e} after {self.received} bytes") from None
        if not data:
            raise Broken(f"the connection ended after {self.received} bytes")
        self.received += len(data)
        self._buffer += data

    def _until(self, mark: bytes) -> bytes:
        while mark not in self._buffer:
            self._more()
        found, self._buffer = self._buffer.split(mark, 1)
        return found

    def _exactly(self, size: int) -> bytes:
        while len(self._buffer) < size:
            self._more()
        found, self._buffer = self._buffer[:size], self._buffer[size:]
        return found

    def _to_the_end(self) -> bytes:
        while True:
            try:
                self._more()
            except Broken as e:
                if "ended" not in str(e):
                    raise
                found, self._buffer = self._buffer, b""
                return found
