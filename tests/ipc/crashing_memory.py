"""Memory on which a writer crashes after a given number of stores."""

from __future__ import annotations

from typing import Any


class Crash(Exception):
    """The writer is killed before this store."""


class StoreBudget:
    """The number of stores that a writer can still make; None: no limit."""

    def __init__(self, stores: int | None = None) -> None:
        self.left = stores
        self.made = 0

    def spend(self) -> None:
        """Count one store; raise Crash if none is left."""
        if self.left is not None:
            if not self.left:
                raise Crash
            self.left -= 1
        self.made += 1


class CrashingMemory:
    """A memoryview that spends one store of `budget` for each assignment.

    With `torn`, a slice of bytes is written in two halves, each one store: a crash can interrupt a memcpy, too.
    """

    def __init__(self, view: memoryview, budget: StoreBudget, torn: bool = False) -> None:
        self._view, self._budget, self._torn = view, budget, torn

    def __len__(self) -> int:
        return len(self._view)

    def __getitem__(self, key: Any) -> Any:
        found = self._view[key]
        return CrashingMemory(found, self._budget, self._torn) if isinstance(found, memoryview) else found

    def __setitem__(self, key: Any, value: Any) -> None:
        if self._torn and isinstance(key, slice) and len(value) > 1:
            half, (start, stop, _) = len(value) // 2, key.indices(len(self._view))
            self._budget.spend()
            self._view[start : start + half] = value[:half]
            self._budget.spend()
            self._view[start + half : stop] = value[half:]
        else:
            self._budget.spend()
            self._view[key] = value

    def cast(self, form: str) -> CrashingMemory:
        return CrashingMemory(self._view.cast(form), self._budget, self._torn)
