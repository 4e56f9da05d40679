"""Memory whose writer can be made to die: every store counts, and the one after the last allowed raises."""

from __future__ import annotations

from typing import Any


class Died(Exception):
    """The writer was killed before this store."""


class Life:
    """How many more stores a writer will live to make. None: for ever."""

    def __init__(self, stores: int | None = None) -> None:
        self.left = stores
        self.made = 0

    def spend(self) -> None:
        if self.left is not None:
            if not self.left:
                raise Died
            self.left -= 1
        self.made += 1


class Mortal:
    """Stands in for a memoryview: passes everything on, and spends a store of `life` on each assignment.

    With `torn`, a slice of bytes goes in two halves, each a store: a memcpy can be cut short too.
    """

    def __init__(self, view: memoryview, life: Life, torn: bool = False) -> None:
        self._view, self._life, self._torn = view, life, torn

    def __len__(self) -> int:
        return len(self._view)

    def __getitem__(self, key: Any) -> Any:
        found = self._view[key]
        return Mortal(found, self._life, self._torn) if isinstance(found, memoryview) else found

    def __setitem__(self, key: Any, value: Any) -> None:
        if self._torn and isinstance(key, slice) and len(value) > 1:
            half, start = len(value) // 2, key.start
            self._life.spend()
            self._view[start : start + half] = value[:half]
            self._life.spend()
            self._view[start + half : key.stop] = value[half:]
        else:
            self._life.spend()
            self._view[key] = value

    def cast(self, form: str) -> Mortal:
        return Mortal(self._view.cast(form), self._life, self._torn)
