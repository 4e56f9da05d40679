"""Which engine was given which beginnings of prompts, so that a like prompt can be sent where its KV is. Pure.

A guess, made without asking anybody: engines evict blocks unheard, and what other frontends sent is not known here.
A prompt is known by its beginnings of 4, 8, 16, ... blocks, so that it costs a few look-ups however long it is. Of a
common beginning at least half is found, if it is worth anything: what is shorter saves less than a request costs.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence

_CAPACITY = 1 << 15  # beginnings remembered
_SHORTEST, _LONGEST = 4, 1 << 10  # blocks


class PrefixAffinity:
    """The memory of one frontend, of at most `capacity` beginnings: the longest unused is forgotten."""

    def __init__(self, engines: int, block_size: int, capacity: int = _CAPACITY) -> None:
        self._engines = engines
        self._everybody = (1 << engines) - 1
        self._block_size = block_size
        self._capacity = capacity
        self._given: OrderedDict[int, int] = OrderedDict()  # name of a beginning -> bit set of engines

    def names(self, prompt: array[int], salt: bytes = b"") -> list[int]:
        """Names of the prompt's beginnings of 4, 8, 16, ... blocks, for the other methods. Its last token is left
        out, as engines compute it in any case. `prompt`: token ids, u32; `salt`: prompts of another are never alike.
        """
        packed = prompt.tobytes()
        width = prompt.itemsize * self._block_size
        blocks = min((len(prompt) - 1) // self._block_size, _LONGEST)
        names = []
        name, start, end = hash(salt), 0, _SHORTEST
        while end <= blocks:
            name = hash((name, packed[start * width : end * width]))
            names.append(name)
            start, end = end, end * 2
        return names

    def matched(self, names: Sequence[int]) -> list[int] | None:
        """Leading blocks of the prompt that each engine is thought to hold; None: all the same."""
        given = self._given
        found: list[int] | None = None
        seen, blocks = 0, _SHORTEST << len(names)
        for name in reversed(names):
            blocks >>= 1
            new = given.get(name, 0) & ~seen
            if new:
                if new == self._everybody:
                    return None
                found = found or [0] * self._engines
                _mark(found, new, blocks)
                seen |= new
        return found

    def record(self, names: Sequence[int], engine: int) -> None:
        """The prompt was given to `engine`."""
        given, bit = self._given, 1 << engine
        for name in names:
            given[name] = given.get(name, 0) | bit
            given.move_to_end(name)
        while len(given) > self._capacity:
            given.popitem(last=False)

    def forget(self, engine: int) -> None:
        """The engine is gone, and all that it held."""
        others = ~(1 << engine)
        for name, engines in list(self._given.items()):
            if engines & others:
                self._given[name] = engines & others
            else:
                del self._given[name]


def _mark(found: list[int], engines: int, blocks: int) -> None:
    """Note `blocks` for each of a bit set of engines."""
    while engines:
        lowest = engines & -engines
        found[lowest.bit_length() - 1] = blocks
        engines ^= lowest
