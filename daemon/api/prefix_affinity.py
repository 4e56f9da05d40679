"""Prefix affinity: which engine was given which prompt prefixes, and so may hold the KV of a similar prompt. Pure.

The answer is a guess: engines do not report evictions, and prompts that other frontends dispatched are not known.
A prompt is represented by its prefixes of 4, 8, 16, ... blocks, so a prompt of any length costs a few look-ups.
At least half of a common prefix of 4 blocks or more is found; a shorter one saves less than a request costs.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence

_CAPACITY = 1 << 15  # prefixes remembered
_SHORTEST, _LONGEST = 4, 1 << 10  # blocks


class PrefixAffinity:
    """Prefixes that one frontend has dispatched, at most `capacity`: the least recently used is dropped first."""

    def __init__(self, engines: int, block_size: int, capacity: int = _CAPACITY) -> None:
        self._engines = engines
        self._all_engines = (1 << engines) - 1
        self._block_size = block_size
        self._capacity = capacity
        self._holders: OrderedDict[int, int] = OrderedDict()  # prefix key -> bit set of engines

    def keys(self, prompt: array[int], salt: bytes = b"") -> list[int]:
        """Return the keys of the prompt's prefixes of 4, 8, 16, ... blocks, for the other methods.

        `prompt`: token ids, u32. Its last token is left out, because engines compute it in any case. Prompts with
        different `salt` have no key in common.
        """
        packed = prompt.tobytes()
        width = prompt.itemsize * self._block_size
        blocks = min((len(prompt) - 1) // self._block_size, _LONGEST)
        keys = []
        key, start, end = hash(salt), 0, _SHORTEST
        while end <= blocks:
            key = hash((key, packed[start * width : end * width]))
            keys.append(key)
            start, end = end, end * 2
        return keys

    def matched(self, keys: Sequence[int]) -> list[int] | None:
        """Return how many leading blocks of the prompt each engine probably holds; None if all hold the same."""
        holders = self._holders
        found: list[int] | None = None
        seen, blocks = 0, _SHORTEST << len(keys)
        for key in reversed(keys):
            blocks >>= 1
            new = holders.get(key, 0) & ~seen
            if new:
                if new == self._all_engines:
                    return None
                found = found or [0] * self._engines
                _set_blocks(found, new, blocks)
                seen |= new
        return found

    def record(self, keys: Sequence[int], engine: int) -> None:
        """Record that the prompt with these keys was given to `engine`."""
        holders, bit = self._holders, 1 << engine
        for key in keys:
            holders[key] = holders.get(key, 0) | bit
            holders.move_to_end(key)
        while len(holders) > self._capacity:
            holders.popitem(last=False)

    def forget(self, engine: int) -> None:
        """Remove an engine from all prefixes: it died, and its KV cache with it."""
        others = ~(1 << engine)
        for key, engines in list(self._holders.items()):
            if engines & others:
                self._holders[key] = engines & others
            else:
                del self._holders[key]


def _set_blocks(found: list[int], engines: int, blocks: int) -> None:
    """Set found[i] = blocks for each engine i of a bit set."""
    while engines:
        lowest = engines & -engines
        found[lowest.bit_length() - 1] = blocks
        engines ^= lowest
