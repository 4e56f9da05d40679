"""Clients of several kinds. Each sends one request and reports every byte that it has received, and when."""

from __future__ import annotations

import asyncio
import json
import socket
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import aiohttp

from bench.answers import Answer, Broken, read_body, read_events
from bench.nemesis.requests import Template

PATIENCE = 150.0  # seconds without a byte after which a response counts as lost; a hung frontend takes 40


@dataclass
class Attempt:
    """One try to get an answer. Times are seconds of CLOCK_MONOTONIC."""

    name: str  # x-request-id
    template: int
    sent: float = 0.0
    status: int = 0
    arrivals: list[float] = field(default_factory=list)  # of parts of the body
    body: bytearray = field(default_factory=bytearray)
    answer: Answer | None = None  # of a client that shows no bytes
    broken: str = ""  # how it failed; empty: the response ended as HTTP says
    ended: float = 0.0

    @property
    def begun(self) -> bool:
        """True if any byte of the response has arrived."""
        return bool(self.status)

    def arrived(self, data: bytes) -> None:
        self.arrivals.append(monotonic())
        self.body += data

    def read(self, stream: bool) -> Answer:
        """Return the answer. Raises Broken."""
        if self.broken:
            raise Broken(self.broken)
        if self.answer is not None:
            return self.answer
        if stream and self.status == 200:
            return read_events(self.status, bytes(self.body))
        try:
            return read_body(self.status, json.loads(self.body))
        except ValueError as e:
            raise Broken(f"the body is no JSON: {e}: {bytes(self.body[-200:])!r}") from None


class Client(ABC):
    """One client, which sends its requests one after the other."""

    gaps = True  # it reads as fast as bytes arrive, so a pause of its stream is a pause of the server

    def __init__(self, url: str, model: str) -> None:
        self.url = url
        self.model = model

    async def send(self, template: Template, name: str) -> Attempt:
        """Send the request and read its response to the end, however it ends."""
        attempt = Attempt(name, template.number, monotonic())
        try:
            async with asyncio.timeout(None) as patience:
                watch = asyncio.create_task(_watch(attempt, patience))
                try:
                    await self._exchange(template, attempt)
                finally:
                    watch.cancel()
        except TimeoutError:
            attempt.broken = f"nothing for {PATIENCE:g} s"
        except (OSError, Broken, aiohttp.ClientError, EOFError) as e:
            attempt.broken = f"{type(e).__name__}: {e}"
        attempt.ended = monotonic()
        return attempt

    @abstractmethod
    async def _exchange(self, template: Template, attempt: Attempt) -> None:
        """Send the request and read the response. May raise OSError, EOFError, Broken or aiohttp's ClientError."""

    async def close(self) -> None:  # noqa: B027
        """Close its connections."""

    def _body(self, template: Template) -> bytes:
        return json.dumps({"model": self.model} | template.body).encode()


async def _watch(attempt: Attempt, patience: asyncio.Timeout) -> None:
    """End the exchange if no byte has come for too long."""
    while True:
        last = attempt.arrivals[-1] if attempt.arrivals else attempt.sent
        if monotonic() - last > PATIENCE:
            patience.reschedule(asyncio.get_running_loop().time())
            return
        await asyncio.sleep(1.0)


class AioHttp(Client):
    """aiohttp, with its pool of connections."""

    def __init__(self, url: str, model: str) -> None:
        super().__init__(url, model)
        self._session: aiohttp.ClientSession | None = None

    async def _exchange(self, template: Template, attempt: Attempt) -> None:
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None))
        headers = {"Content-Type": "application/json", "x-request-id": attempt.name}
        body = self._body(template)
        async with self._session.post(self.url + template.path, data=body, headers=headers) as response:
            attempt.status = response.status
            async for data in response.content.iter_any():
                attempt.arrived(data)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()


class Curl(Client):
    """The curl program: one process and one connection for each request."""

    async def _exchange(self, template: Template, attempt: Attempt) -> None:
        command = ["curl", "-sSN", "-X", "POST", "-H", "Content-Type: application/json", "--data-binary", "@-"]
        command += ["-H", f"x-request-id: {attempt.name}", "-w", "%{stderr}%{http_code}", self.url + template.path]
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=pipe)
        assert process.stdin and process.stdout and process.stderr
        try:
            process.stdin.write(self._body(template))
            process.stdin.close()
            while data := await process.stdout.read(1 << 16):
                attempt.arrived(data)
            said = (await process.stderr.read()).decode()
            if await process.wait():
                attempt.status = 200 if attempt.body else 0
                raise Broken(f"curl: exit code {process.returncode}: {said}")
            attempt.status = int(said[-3:])
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


class Raw(Client):
    """A plain socket: HTTP/1.1, which keeps the connection unless a response ends it."""

    version = "1.1"
    headers = ""
    receive_buffer = 0
    part = 1 << 16  # bytes to read at once
    pause = 0.0  # seconds between two reads

    def __init__(self, url: str, model: str) -> None:
        super().__init__(url, model)
        host, _, port = url.removeprefix("http://").partition(":")
        self._address = host, int(port)
        self._sock: socket.socket | None = None
        self._buffer = b""

    async def _exchange(self, template: Template, attempt: Attempt) -> None:
        keep = False
        try:
            if self._sock is None:
                await self._connect()
            await self._send(template, attempt)
            keep = await self._receive(attempt)
        finally:
            if not keep:
                await self.close()

    async def _connect(self) -> None:
        self._sock = socket.socket()
        self._sock.setblocking(False)
        if self.receive_buffer:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.receive_buffer)
        self._buffer = b""
        await asyncio.get_running_loop().sock_connect(self._sock, self._address)

    async def _send(self, template: Template, attempt: Attempt) -> None:
        assert self._sock is not None
        data = self._body(template)
        head = f"POST {template.path} HTTP/{self.version}\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += f"{self.headers}x-request-id: {attempt.name}\r\nContent-Length: {len(data)}\r\n\r\n"
        await asyncio.get_running_loop().sock_sendall(self._sock, head.encode() + data)

    async def _receive(self, attempt: Attempt) -> bool:
        """Read the response. Return True if the connection can be used again."""
        head = (await self._until(b"\r\n\r\n")).decode()
        attempt.status = int(head.split()[1])
        fields = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if line)
        keep = self.version == "1.1" and fields.get("connection") != "close"
        if fields.get("transfer-encoding") == "chunked":
            while size := int(await self._until(b"\r\n"), 16):
                attempt.arrived(await self._exactly(size))
                if await self._exactly(2) != b"\r\n":
                    raise Broken("a chunk does not end where it should")
            if await self._exactly(2) != b"\r\n":
                raise Broken("the last chunk does not end")
        elif "content-length" in fields:
            attempt.arrived(await self._exactly(int(fields["content-length"])))
        else:
            keep = False
            attempt.arrived(self._buffer)
            while data := await self._read():
                attempt.arrived(data)
            self._buffer = b""
        if self._buffer:
            raise Broken(f"bytes after the response: {self._buffer[:80]!r}")
        return keep and not self.headers

    async def _read(self) -> bytes:
        assert self._sock is not None
        if self.pause:
            await asyncio.sleep(self.pause)
        return await asyncio.get_running_loop().sock_recv(self._sock, self.part)

    async def _more(self) -> None:
        if not (data := await self._read()):
            raise EOFError("the connection ended in the middle")
        self._buffer += data

    async def _until(self, mark: bytes) -> bytes:
        while mark not in self._buffer:
            await self._more()
        found, self._buffer = self._buffer.split(mark, 1)
        return found

    async def _exactly(self, size: int) -> bytes:
        while len(self._buffer) < size:
            await self._more()
        found, self._buffer = self._buffer[:size], self._buffer[size:]
        return found

    async def close(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None


class Closing(Raw):
    """A new connection for each request, with `Connection: close`."""

    headers = "Connection: close\r\n"


class OldHttp(Raw):
    """HTTP/1.0: the end of the connection is the end of the response."""

    version = "1.0"


class Slow(Raw):
    """Reads slowly, through a small receive buffer: most of its response waits in the kernel and the outbox."""

    gaps = False
    headers = "Connection: close\r\n"
    receive_buffer = 4096
    part = 2048
    pause = 0.05


class OpenAi(Client):
    """The openai SDK."""

    def __init__(self, url: str, model: str) -> None:
        import openai

        super().__init__(url, model)
        self._errors = openai
        self._sdk = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=2 * PATIENCE)

    async def _exchange(self, template: Template, attempt: Attempt) -> None:
        create: Any = self._sdk.completions.create
        if "messages" in template.body:
            create = self._sdk.chat.completions.create
        known = {k: v for k, v in template.body.items() if k not in ("ignore_eos", "min_tokens")}
        more = {k: v for k, v in template.body.items() if k not in known}
        headers = {"x-request-id": attempt.name}
        try:
            found = await create(model=self.model, **known, extra_body=more, extra_headers=headers)
            if not template.stream:
                attempt.status = 200
                attempt.arrivals.append(monotonic())
                attempt.answer = read_body(200, found.to_dict(mode="json", exclude_unset=True))
                return
            answer = Answer(200)
            async for chunk in found:
                attempt.status = 200
                attempt.arrivals.append(monotonic())
                answer.add(chunk.to_dict(mode="json", exclude_unset=True))
            attempt.status, attempt.answer = 200, answer
        except self._errors.APIStatusError as e:
            attempt.status = e.status_code
            attempt.answer = Answer(e.status_code, errors=[e.body])
        except Exception as e:  # what httpx raises inside of a stream goes through
            if isinstance(e, asyncio.CancelledError | OSError):
                raise
            raise Broken(f"{type(e).__name__}: {e}") from None

    async def close(self) -> None:
        await self._sdk.close()


KINDS: dict[str, type[Client]] = {
    "aiohttp": AioHttp,
    "keep-alive": Raw,
    "close": Closing,
    "curl": Curl,
    "openai": OpenAi,
    "slow": Slow,
    "http/1.0": OldHttp,
}
