"""Reading of request bodies: a bound on their sum in memory, a lowest rate, and freed memory back to the system."""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Callable
from types import TracebackType

from aiohttp import web
from aiohttp.http_exceptions import PayloadEncodingError

from daemon.api.errors import bad_request, bodies_full, body_timeout, body_too_large
from daemon.ipc.metrics_page import MetricsPage

FREE_BYTES = 64 << 10  # of each body; they do not count, so large bodies never keep small ones out
BODY_TIMEOUT = 60.0  # seconds for a client to send its body
WINDOW = 10.0  # seconds in which a client must send at least WINDOW_BYTES, or all that is missing
WINDOW_BYTES = 64 << 10
_TRIM_AFTER = 4 << 20  # bytes of bodies that were freed since memory was last given back
_TRIM_DELAY = 1.0  # seconds from then until it is given back
_MMAP_THRESHOLD_PARAMETER = -3  # M_MMAP_THRESHOLD of glibc's mallopt
_MMAP_THRESHOLD = 1 << 20


class BodyMemory:
    """The request bodies of one frontend that are not tokenised yet. At most `limit` of their bytes are in memory."""

    def __init__(self, limit: int, page: MetricsPage, trim: Callable[[], None]) -> None:
        """`trim`: called in a while after large bodies were freed; gives freed memory back to the system."""
        self._limit = limit
        self._page = page
        self._trim = trim
        self._used = 0
        self._freed = 0
        self._timer: asyncio.TimerHandle | None = None

    def hold(self) -> HeldBody:
        """Return a holder for one body."""
        return HeldBody(self)

    def take(self, count: int) -> None:
        """Add `count` bytes. Raises ApiError (503) if there is no room."""
        if self._used + count > self._limit:
            raise bodies_full(self._limit)
        self._used += count
        self._page.set("request_body_bytes", self._used)

    def give_back(self, count: int, size: int) -> None:
        """Remove `count` bytes of a body of `size` bytes. Its memory goes back to the system a moment later."""
        self._used -= count
        self._page.set("request_body_bytes", self._used)
        self._freed += size
        if self._freed >= _TRIM_AFTER and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_TRIM_DELAY, self._start_trim)

    def _start_trim(self) -> None:
        self._timer, self._freed = None, 0
        asyncio.get_running_loop().run_in_executor(None, self._trim)


class HeldBody:
    """The share of one body in the sum, until `release`. A context: leaving it releases it."""

    def __init__(self, memory: BodyMemory) -> None:
        self._memory = memory
        self._counted = 0
        self.size = 0

    async def read(self, http: web.Request, limit: int) -> bytes:
        """Return the body of a request. Raises ApiError: 408, 413, 503, or 400 for a body that breaks off."""
        loop = asyncio.get_running_loop()
        body = bytearray()
        end = loop.time() + BODY_TIMEOUT
        window_end, window_size = loop.time() + WINDOW, WINDOW_BYTES
        try:
            while True:
                async with asyncio.timeout_at(min(window_end, end)):
                    chunk = await http.content.readany()
                if not chunk:
                    return bytes(body)
                if len(body) + len(chunk) > limit:
                    raise body_too_large(limit)
                self._grow(len(chunk))
                body += chunk
                if len(body) >= window_size:
                    window_end, window_size = loop.time() + WINDOW, len(body) + WINDOW_BYTES
        except TimeoutError:
            late = loop.time() >= end
            raise body_timeout(
                f"The body did not arrive within {BODY_TIMEOUT:g} seconds."
                if late
                else f"The body arrives too slowly: less than {WINDOW_BYTES} bytes in {WINDOW:g} seconds."
            ) from None
        except (web.RequestPayloadError, PayloadEncodingError):
            raise bad_request("The body is incomplete or has a wrong encoding.") from None

    def _grow(self, count: int) -> None:
        counted = max(0, self.size + count - FREE_BYTES)
        self._memory.take(counted - self._counted)
        self._counted = counted
        self.size += count

    def release(self) -> None:
        """Take the body out of the sum. No effect on later calls."""
        if self.size:
            self._memory.give_back(self._counted, self.size)
            self._counted = self.size = 0

    def __enter__(self) -> HeldBody:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def keep_large_blocks_apart() -> None:
    """Let the C library map each block of 1 MiB or more by itself, so that the system gets it back when it is freed.

    By default glibc raises this size to that of the largest block it has freed, up to 32 MiB. No effect elsewhere.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD_PARAMETER, _MMAP_THRESHOLD)


def trim_memory() -> None:
    """Give freed memory back to the system, as far as the C library can (glibc). Call it in a thread."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
