"""Host buffers in rotation, and the marks that say when the device is done with one.

The device copies from a host buffer some time after it has been told to. Until then nobody may write to it: so there
are several sets, taken in turn, and a set is handed out again only after the mark of its last use is reached.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch

_ALIGNMENT = 16
_TORCH_DTYPES = {"int32": torch.int32, "int64": torch.int64, "float32": torch.float32, "float64": torch.float64}


class Mark(Protocol):
    """A point in a stream's work."""

    def wait(self) -> None:
        """Return once all work before the mark is done."""
        ...


class Stream(Protocol):
    """A device's work in order."""

    def submit(self, work: Callable[[], None]) -> None:
        """Have `work` done after all that was submitted before; it may be done, or only under way, on return."""
        ...

    def mark(self) -> Mark:
        """A mark behind all work submitted so far."""
        ...


class HostStream:
    """Work is done at once, where it is submitted."""

    def submit(self, work: Callable[[], None]) -> None:
        work()

    def mark(self) -> Mark:
        return _Reached()


class _Reached:
    def wait(self) -> None:
        return None


class CudaStream:
    """One CUDA stream: what `work` launches goes there."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)

    def submit(self, work: Callable[[], None]) -> None:
        with torch.cuda.stream(self.stream):
            work()

    def mark(self) -> Mark:
        event = torch.cuda.Event()
        event.record(self.stream)
        return _Event(event)


class _Event(NamedTuple):
    event: Any

    def wait(self) -> None:
        self.event.synchronize()


class Field(NamedTuple):
    """An array of `length` items of a numpy `dtype`."""

    name: str
    dtype: str
    length: int


class Packed:
    """Where named arrays lie in one piece of memory, so that one copy moves them all. The last may be cut short."""

    def __init__(self, fields: Sequence[Field]) -> None:
        self.fields = tuple(fields)
        self._offsets: list[int] = []
        self.nbytes = 0
        for field in fields:
            self._offsets.append(self.nbytes)
            size = field.length * np.dtype(field.dtype).itemsize
            self.nbytes += -(-size // _ALIGNMENT) * _ALIGNMENT

    def tensors(self, memory: torch.Tensor) -> dict[str, torch.Tensor]:
        """Views of `memory`, uint8[nbytes] on any device."""
        views = {}
        for field, offset in zip(self.fields, self._offsets, strict=True):
            size = field.length * np.dtype(field.dtype).itemsize
            views[field.name] = memory[offset : offset + size].view(_TORCH_DTYPES[field.dtype])
        return views

    def used(self, last: int) -> int:
        """Bytes to move if the last array holds but `last` items."""
        return self._offsets[-1] + last * np.dtype(self.fields[-1].dtype).itemsize


def host_memory(nbytes: int, *, pinned: bool) -> torch.Tensor:
    """uint8[nbytes] of zeros; `pinned`: the device can read it while the host goes on."""
    return torch.zeros(nbytes, dtype=torch.uint8, pin_memory=pinned)


T = TypeVar("T")


class Rotation(Generic[T]):
    """Sets of buffers, handed out in turn."""

    def __init__(self, sets: Sequence[T]) -> None:
        self._sets = sets
        self._marks: list[Mark | None] = [None] * len(sets)
        self._turn = 0

    def next(self) -> T:
        """The set whose turn it is, once the device is done with its last use; the same until it is used."""
        mark = self._marks[self._turn]
        if mark is not None:
            mark.wait()
            self._marks[self._turn] = None
        return self._sets[self._turn]

    def until(self, mark: Mark) -> None:
        """The set last handed out is in use until `mark`; the next one's turn has come."""
        self._marks[self._turn] = mark
        self._turn = (self._turn + 1) % len(self._sets)
