"""Host buffers that are used in turn, and the stream events after which the device has finished with one.

The device copies from a host buffer some time after the copy is submitted. Until then the host must not write to the
buffer. So there are several sets, used in turn, and a set is used again only after the event of its last use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch

_ALIGNMENT = 16
_HIGH_PRIORITY = -1
_TORCH_DTYPES = {"int32": torch.int32, "int64": torch.int64, "float32": torch.float32, "float64": torch.float64}


class StreamEvent(Protocol):
    """A point in the work of a stream."""

    def wait(self) -> None:
        """Return when all work before the event is done."""
        ...

    def is_done(self) -> bool:
        """Return True if all work before the event is done. Does not wait."""
        ...


class Stream(Protocol):
    """Work of a device, in order."""

    def submit(self, work: Callable[[], None]) -> None:
        """Submit `work`, to run after all earlier work. On return it may be done or still in flight."""
        ...

    def record_event(self) -> StreamEvent:
        """Return an event after all work submitted so far."""
        ...


class HostStream:
    """Runs work at once, in `submit`."""

    def submit(self, work: Callable[[], None]) -> None:
        work()

    def record_event(self) -> StreamEvent:
        return _DoneEvent()


class _DoneEvent:
    def wait(self) -> None:
        return None

    def is_done(self) -> bool:
        return True


class CudaStream:
    """One CUDA stream, in which `work` launches. It has priority over the streams that copy between pools."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device, priority=_HIGH_PRIORITY)

    def submit(self, work: Callable[[], None]) -> None:
        with torch.cuda.stream(self.stream):
            work()

    def record_event(self) -> StreamEvent:
        event = torch.cuda.Event()
        event.record(self.stream)
        return _CudaEvent(event)


class _CudaEvent(NamedTuple):
    event: Any

    def wait(self) -> None:
        self.event.synchronize()

    def is_done(self) -> bool:
        return bool(self.event.query())


class Field(NamedTuple):
    """An array of `length` items of a numpy `dtype`."""

    name: str
    dtype: str
    length: int


class Packed:
    """Layout of named arrays in one memory block, so that one copy moves all of them. The last one may be cut."""

    def __init__(self, fields: Sequence[Field]) -> None:
        self.fields = tuple(fields)
        self._offsets: list[int] = []
        self.nbytes = 0
        for field in fields:
            self._offsets.append(self.nbytes)
            size = field.length * np.dtype(field.dtype).itemsize
            self.nbytes += -(-size // _ALIGNMENT) * _ALIGNMENT

    def tensors(self, memory: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return views of `memory`, uint8[nbytes] on any device."""
        views = {}
        for field, offset in zip(self.fields, self._offsets, strict=True):
            size = field.length * np.dtype(field.dtype).itemsize
            views[field.name] = memory[offset : offset + size].view(_TORCH_DTYPES[field.dtype])
        return views

    def used(self, last: int) -> int:
        """Return the bytes to copy if the last array has only `last` items."""
        return self._offsets[-1] + last * np.dtype(self.fields[-1].dtype).itemsize


def host_memory(nbytes: int, *, pinned: bool) -> torch.Tensor:
    """Return uint8[nbytes] of zeros. `pinned`: the device can read it while the host continues."""
    return torch.zeros(nbytes, dtype=torch.uint8, pin_memory=pinned)


T = TypeVar("T")


class RoundRobin(Generic[T]):
    """Sets of buffers that are used in turn."""

    def __init__(self, sets: Sequence[T]) -> None:
        self._sets = sets
        self._events: list[StreamEvent | None] = [None] * len(sets)
        self._current = 0

    def acquire(self) -> T:
        """Return the current set, after the device has finished with its last use.

        Repeated calls return the same set.
        """
        event = self._events[self._current]
        if event is not None:
            event.wait()
            self._events[self._current] = None
        return self._sets[self._current]

    def release_at(self, event: StreamEvent) -> None:
        """Mark the current set as in use until `event`, and go to the next set."""
        self._events[self._current] = event
        self._current = (self._current + 1) % len(self._sets)
