"""Compiles the grammars of requests, in another process: see `daemon.models.grammar.checker`.

The process starts with the first grammar and ends with this one. Engines compile a grammar again, but only one that
has been compiled here within the limits.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import cast

from daemon.api.errors import ApiError, bad_request
from daemon.config import Config
from daemon.models.grammar.checker import Frames, Reply, Request, decode_reply, frame
from daemon.models.grammar.source import GrammarSource
from daemon.models.model_config import ModelConfig

log = logging.getLogger(__name__)

_PACKAGE_ROOT = Path(__file__).parents[3]
_CACHE_BYTES = 8 << 20  # of grammars whose reply is known
_WAIT = 60.0  # seconds for a reply, with the start of the process and the grammars before this one


class GrammarCompiler:
    """Replies of the other process, by source. `close` ends it."""

    def __init__(self, config: Config, model: ModelConfig) -> None:
        self._max_size = config.max_grammar
        self._seconds = config.grammar_timeout
        self._model = model
        self._known: OrderedDict[GrammarSource, Reply] = OrderedDict()
        self._known_bytes = 0
        self._running: dict[GrammarSource, asyncio.Future[Reply]] = {}
        self._process: _Process | None = None

    def close(self) -> None:
        """End the other process. The frontend's exit does the same."""
        if self._process is not None:
            self._process.close()

    async def compile(self, source: GrammarSource, param: str) -> str:
        """Return the grammar as engines take it. Raises ApiError (400) that names `param` if it cannot be used."""
        if not self._model.eos_token_ids:
            message = "This model has no end-of-sequence token, so its output cannot be constrained."
            raise bad_request(message, param, "unsupported_parameter")
        if source.size > self._max_size:
            message = f"`{param}` has {source.size} bytes; this server accepts at most {self._max_size}."
            raise bad_request(message, param)
        reply = self._known.get(source) or await self._ask(source)
        if source in self._known:
            self._known.move_to_end(source)
        if reply.error:
            raise bad_request(f"`{param}` cannot be used to constrain the output: {reply.error}", param)
        return reply.grammar

    async def _ask(self, source: GrammarSource) -> Reply:
        """Return the reply of the other process. Equal sources at the same time are compiled once."""
        future = self._running.get(source)
        if future is None:
            future = self._running[source] = asyncio.get_running_loop().create_future()
            future.add_done_callback(lambda done: self._on_reply(source, done))
            self._send(source, future)
        try:
            return await asyncio.wait_for(asyncio.shield(future), _WAIT)
        except (TimeoutError, ConnectionError):
            message = "The grammar could not be compiled now; try again shortly."
            raise ApiError(503, message, type="server_error", code="grammar_compiler") from None

    def _send(self, source: GrammarSource, future: asyncio.Future[Reply]) -> None:
        if self._process is None or self._process.closed:
            self._process = _Process(self._model.path)
        self._process.send(source, self._seconds, future)

    def _on_reply(self, source: GrammarSource, future: asyncio.Future[Reply]) -> None:
        del self._running[source]
        if future.cancelled() or future.exception() is not None:
            return
        self._known[source] = future.result()
        self._known_bytes += _size(source, future.result())
        while self._known_bytes > _CACHE_BYTES:
            self._known_bytes -= _size(*self._known.popitem(last=False))


def _size(source: GrammarSource, reply: Reply) -> int:
    return source.size + len(reply.grammar) + len(reply.error)


class _Process(asyncio.Protocol):
    """The other process and the connection to it."""

    def __init__(self, model: Path) -> None:
        here, there = socket.socketpair()
        self.closed = False
        self._socket = here
        self._number = 0
        self._waiting: dict[int, asyncio.Future[Reply]] = {}
        self._unsent = bytearray()
        self._frames = Frames()
        self._transport: asyncio.Transport | None = None
        with there:
            command = [sys.executable, "-m", "daemon.models.grammar.checker", str(model), str(there.fileno())]
            self._process = subprocess.Popen(
                command, cwd=_PACKAGE_ROOT, stdin=subprocess.DEVNULL, pass_fds=[there.fileno()]
            )
        here.setblocking(False)
        self._connecting = asyncio.ensure_future(
            asyncio.get_running_loop().create_connection(lambda: self, sock=here)
        )

    def send(self, source: GrammarSource, seconds: float, future: asyncio.Future[Reply]) -> None:
        """Send a source; its reply becomes the result of `future`, or the end of the process its exception."""
        self._number += 1
        self._waiting[self._number] = future
        data = frame(Request(self._number, source, seconds))
        if self._transport is None:
            self._unsent += data
        else:
            self._transport.write(data)

    def close(self) -> None:
        """End the process."""
        self.closed = True
        if self._transport is not None:
            self._transport.abort()
        self._process.kill()
        self._process.wait()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self._transport.write(bytes(self._unsent))
        self._unsent.clear()

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        for message in self._frames.push(data):
            reply = decode_reply(message)
            future = self._waiting.pop(reply.number, None)
            if future is not None and not future.done():
                future.set_result(reply)

    def connection_lost(self, _: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        if not self.closed:
            log.error("the process that compiles grammars has ended; the next grammar starts it again")
            self.close()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(ConnectionResetError())
        self._waiting.clear()
