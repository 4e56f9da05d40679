"""Compiles grammars of clients in processes of their own: ``python -m daemon.models.grammar.checker``.

A hostile grammar can make the compiler take minutes, gigabytes or the whole stack, and it cannot be interrupted. So
this program keeps the vocabulary, and forks a child for each grammar. The child has limits on its time, memory and
stack, and a grammar that exceeds them ends only the child.

The program reads `Request`s from a socket and answers each with a `Reply`, in any order. It ends with its socket.
"""

from __future__ import annotations

import gc
import os
import resource
import selectors
import signal
import socket
import struct
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import NamedTuple, NoReturn

import msgspec

from daemon.models.grammar.errors import GrammarError
from daemon.models.grammar.source import GrammarSource, to_llguidance
from daemon.models.grammar.vocabulary import Vocabulary
from daemon.models.model_config import ModelError, read_model_config
from daemon.models.tokenizer import Tokenizer

MAX_FRAME = 64 << 20  # bytes
_HEAD = struct.Struct("<I")  # the length of a frame

_CHILDREN = 2  # at a time: a hostile grammar must not keep the others waiting
_STACK = 1 << 20  # bytes; engines have much more, so what compiles here compiles there
_MEMORY = 512 << 20  # bytes beyond those of this process
_WAIT = 10.0  # seconds that a child may wait for a busy CPU, besides its own time
_NICE = 5  # engines go first


class Request(msgspec.Struct, array_like=True, frozen=True):
    number: int
    source: GrammarSource
    seconds: float  # CPU time that it may take


class Reply(msgspec.Struct, array_like=True, frozen=True):
    """The grammar in llguidance's form, or why it cannot be used."""

    number: int
    grammar: str = ""
    error: str = ""


_encode = msgspec.msgpack.Encoder().encode
_decode_request = msgspec.msgpack.Decoder(Request).decode
decode_reply = msgspec.msgpack.Decoder(Reply).decode


def frame(message: Request | Reply) -> bytes:
    """Return a message with its length before it."""
    data = _encode(message)
    return _HEAD.pack(len(data)) + data


class Frames:
    """Cuts a stream of bytes into frames."""

    def __init__(self) -> None:
        self._data = bytearray()

    def push(self, data: bytes) -> list[bytes]:
        """Append data; return the frames that are complete now."""
        self._data += data
        found = []
        while len(self._data) >= _HEAD.size:
            end = _HEAD.size + _HEAD.unpack_from(self._data)[0]
            if len(self._data) < end:
                break
            found.append(bytes(self._data[_HEAD.size : end]))
            del self._data[:end]
        return found


class _Child(NamedTuple):
    request: Request
    pid: int
    pipe: int
    deadline: float
    output: bytearray


class Checker:
    """The loop of this program."""

    def __init__(self, vocabulary: Vocabulary, connection: socket.socket) -> None:
        self._vocabulary = vocabulary
        self._connection = connection
        self._frames = Frames()
        self._waiting: deque[Request] = deque()
        self._children: dict[int, _Child] = {}  # by pipe
        self._selector = selectors.DefaultSelector()
        self._selector.register(connection, selectors.EVENT_READ)

    def run(self) -> None:
        """Serve until the other end of the socket is closed."""
        while True:
            while self._waiting and len(self._children) < _CHILDREN:
                self._start(self._waiting.popleft())
            for key, _ in self._selector.select(0.5 if self._children else None):
                if key.fileobj is not self._connection:
                    self._read_child(self._children[key.fd])
                elif not self._read_requests():
                    return
            for child in [c for c in self._children.values() if time.monotonic() > c.deadline]:
                os.kill(child.pid, signal.SIGKILL)

    def _read_requests(self) -> bool:
        data = self._connection.recv(1 << 16)
        self._waiting += [_decode_request(message) for message in self._frames.push(data)]
        return bool(data)

    def _start(self, request: Request) -> None:
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            _compile_and_exit(self._vocabulary, request, write)
        os.close(write)
        child = _Child(request, pid, read, time.monotonic() + request.seconds + _WAIT, bytearray())
        self._children[read] = child
        self._selector.register(read, selectors.EVENT_READ)

    def _read_child(self, child: _Child) -> None:
        """Read what a child has written; at its end, send the reply."""
        if data := os.read(child.pipe, 1 << 16):
            child.output.extend(data)
            return
        self._selector.unregister(child.pipe)
        os.close(child.pipe)
        del self._children[child.pipe]
        _, status = os.waitpid(child.pid, 0)
        reply = bytes(child.output)
        if os.waitstatus_to_exitcode(status) != 0 or not reply:
            reply = frame(Reply(child.request.number, error=_why(status, child.request.seconds)))
        self._connection.sendall(reply)


def _why(status: int, seconds: float) -> str:
    """Return why a child has ended without a reply."""
    ended_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if ended_by in (signal.SIGPROF, signal.SIGXCPU, signal.SIGKILL):
        return f"it takes more than {seconds:g} seconds to compile"
    if ended_by in (signal.SIGSEGV, signal.SIGBUS):
        return "its rules are nested too deeply"
    return f"it takes more than {_MEMORY >> 20} MiB of memory to compile"


def _compile_and_exit(vocabulary: Vocabulary, request: Request, pipe: int) -> NoReturn:
    """In the child: compile the grammar, write the reply and exit."""
    try:
        _limit(request.seconds)
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)  # a panic of the compiler says what the client has sent
        replies: list[bytes] = []
        threading.stack_size(_STACK)
        thread = threading.Thread(target=lambda: replies.append(frame(_compile(vocabulary, request))))
        thread.start()
        thread.join()
        left = memoryview(replies[0])
        while left:
            left = left[os.write(pipe, left) :]
        os._exit(0)
    finally:
        os._exit(1)


def _compile(vocabulary: Vocabulary, request: Request) -> Reply:
    try:
        grammar = to_llguidance(request.source)
        matcher = vocabulary.compile(grammar)
        matcher.compute_bitmask()  # the first mask is the most expensive one
        if matcher.is_error():
            return Reply(request.number, error=matcher.get_error())
    except GrammarError as e:
        return Reply(request.number, error=str(e))
    except MemoryError:
        return Reply(request.number, error=f"it takes more than {_MEMORY >> 20} MiB of memory to compile")
    return Reply(request.number, grammar)


def _limit(seconds: float) -> None:
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + _MEMORY, size + _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, seconds)  # of CPU time; the signal ends the process


def main() -> int:
    """Serve the socket whose descriptor is the second argument, for the model directory that is the first."""
    path, connection = Path(sys.argv[1]), socket.socket(fileno=int(sys.argv[2]))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # for the group; this process ends with its frontend
    os.nice(_NICE)
    try:
        config = read_model_config(path)
        vocabulary = Vocabulary(Tokenizer(path), config.vocab_size, config.eos_token_ids)
    except (ModelError, GrammarError) as e:
        print(f"grammars cannot be compiled: {e}", file=sys.stderr)
        return 1
    gc.freeze()  # children share the memory as long as nothing touches it
    Checker(vocabulary, connection).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
