"""Standard output and standard error of the daemon's processes: what cannot be written is lost, without an error.

A closed pipe, a full disk, a terminal that is gone or one that does not read must not end or stop a process that
serves. So all processes of the daemon write through `_LossyFile`: also `print`, logging, tracebacks, and the flush by
which `multiprocess` and the interpreter's exit would fail.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import stat
import sys
from typing import TextIO

_PIECE = 4096  # bytes (PIPE_BUF); a pipe that poll() calls writable takes as many without blocking
_PATIENCE = 200  # milliseconds to wait for a reader, once; until it reads again nothing waits


def tolerate_loss() -> None:
    """Replace `sys.stdout` and `sys.stderr` of this process by streams whose writes cannot fail.

    Descriptors 0 to 2 that are closed are opened as /dev/null: the next file would get their numbers, and what a
    library prints would go there.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number, so `fd`
    sys.stdout, sys.stderr = _stream(1), _stream(2)


def _stream(fd: int) -> TextIO:
    own = _own_description(fd)
    raw: io.RawIOBase = _LossyFile(own, "w", closefd=own != fd)
    return io.TextIOWrapper(io.BufferedWriter(raw), errors="backslashreplace", line_buffering=True)


def _own_description(fd: int) -> int:
    """Return a descriptor of our own for the same terminal or pipe, whose writes do not block; otherwise `fd` itself.

    poll() calls a terminal writable while it has room for one byte. O_NONBLOCK on `fd` would hold for the shell, too.
    """
    if os.isatty(fd) or stat.S_ISFIFO(os.fstat(fd).st_mode):
        with contextlib.suppress(OSError):
            return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    return fd


class _LossyFile(io.FileIO):
    """A file that counts bytes as written if it cannot write them, or if the reader of the pipe does not read."""

    _stalled = False

    def write(self, data: bytes | memoryview) -> int:  # type: ignore[override]
        piece = memoryview(data)[:_PIECE]
        try:
            written = super().write(piece) if self._writable_now() else None
        except OSError:
            written = None
        return len(memoryview(data)) if written is None else written

    def _writable_now(self) -> bool:
        poll = select.poll()
        poll.register(self.fileno(), select.POLLOUT)
        self._stalled = not poll.poll(0 if self._stalled else _PATIENCE)
        return not self._stalled
