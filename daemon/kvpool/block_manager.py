"""Who holds which KV block, and which block already holds which tokens. Pure.

Block ids only; the bytes live in `kvpool.memory`. Block 0 is a dummy for padding and is never handed out.
A block is *held* while its reference count is above zero, else *free*. A free block keeps its content and
its hash until it is handed out again, so the free blocks are the prefix cache, least recently used first.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Container, Iterable, Sequence
from hashlib import blake2b
from itertools import islice

HASH_BYTES = 16


class PoolError(RuntimeError):
    """The block accounting was violated; the message names the block."""


def block_hashes(
    tokens: Sequence[int], block_size: int, salt: bytes = b"", have: Sequence[bytes] = ()
) -> list[bytes]:
    """Names of the full blocks of `tokens`, 16 bytes each: H(name of the block before, tokens of this one).

    Equal names mean equal tokens from the beginning on, within one `salt`. `have` holds the names of the
    first blocks where they are known already. Token ids fit in 32 bits.
    """
    hashes = list(have)
    parent = hashes[-1] if hashes else _root(salt)
    for start in range(len(hashes) * block_size, len(tokens) - block_size + 1, block_size):
        content = array("I", tokens[start : start + block_size]).tobytes()
        parent = blake2b(parent + content, digest_size=HASH_BYTES).digest()
        hashes.append(parent)
    return hashes


def _root(salt: bytes) -> bytes:
    """The parent of first blocks. Personalised: no salt can pass for the name of somebody's block."""
    return blake2b(salt, digest_size=HASH_BYTES, person=b"kv-root").digest()


class BlockManager:
    """Hands out the blocks of one pool.

    Tables are append-only: of two equal blocks computed at the same time the first to be registered is found
    by its name and both stay where they are, as exchanging one would rewrite a table that is in use.
    """

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool = True) -> None:
        if num_blocks < 2:
            raise ValueError(f"a pool needs a dummy block and at least one more, not {num_blocks} blocks")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._refs = [0] * num_blocks
        self._names: list[bytes | None] = [None] * num_blocks
        self._by_name: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))  # next to go first

    # -- facts ---------------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        """Blocks that requests can hold: all but the dummy."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out now, cached ones included."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks held, a shared one counted once."""
        return self.capacity - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens fill, the last one perhaps in part."""
        return -(-num_tokens // self.block_size)

    def can_allocate(self, n: int) -> bool:
        return n <= len(self._free)

    def num_idle(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` are free, so that acquiring them would lower `num_free`."""
        return sum(not self._refs[block] for block in blocks)

    # -- handing out and taking back ---------------------------------------------------------------

    def allocate(self, n: int, avoid: Container[int] = ()) -> list[int]:
        """Take `n` free blocks but those to `avoid`, uncached and then least recently used first; what they cached
        is forgotten.

        Raises PoolError, and takes none, if fewer are free.
        """
        blocks = list(islice((block for block in self._free if block not in avoid), n))
        if len(blocks) < n:
            raise PoolError(f"{n} blocks wanted, {len(blocks)} free")
        for block in blocks:
            del self._free[block]
            self._refs[block] = 1
            self._forget(block)
        return blocks

    def acquire(self, blocks: Iterable[int]) -> None:
        """Hold each of `blocks` once more; those from `match` may be free or held."""
        for block in blocks:
            if not self._refs[block]:
                del self._free[block]
            self._refs[block] += 1

    def free(self, table: Sequence[int]) -> None:
        """Hold each block of `table` once less. The last goes first, so that cached prefixes die tail first.

        Raises PoolError if one is not held.
        """
        for block in reversed(table):
            if self._refs[block] < 1:
                raise PoolError(f"block {block} freed but not held")
            self._refs[block] -= 1
            if not self._refs[block]:
                self._free[block] = None
                if self._names[block] is None:  # nothing to find in it: hand it out before any cached one
                    self._free.move_to_end(block, last=False)

    # -- the prefix cache ----------------------------------------------------------------------

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """Blocks of the longest cached prefix of `hashes`. They are not held before `acquire`."""
        matched = []
        for name in hashes:
            block = self._by_name.get(name)
            if block is None:
                break
            matched.append(block)
        return matched

    def register(self, blocks: Sequence[int], hashes: Sequence[bytes]) -> None:
        """Make held, full blocks findable. Call it once their content is computed, or copied, and not before.

        Naming a block again does nothing. Raises PoolError if it is not held or has another name.
        """
        if not self.prefix_caching:
            return
        for block, name in zip(blocks, hashes, strict=True):
            if not self._refs[block]:
                raise PoolError(f"block {block} registered but not held")
            if self._names[block] not in (None, name):
                raise PoolError(f"block {block} registered under a second name")
            if self._by_name.setdefault(name, block) == block:
                self._names[block] = name

    def _forget(self, block: int) -> None:
        name = self._names[block]
        if name is not None:
            self._names[block] = None
            del self._by_name[name]

    # -- invariants ----------------------------------------------------------------------------

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Compare the accounting with `tables`, those of all holders. Raises PoolError at the first flaw."""
        holders: Counter[int] = Counter()
        for table in tables:
            holders.update(table)
            if len(set(table)) < len(table):
                raise PoolError(f"a block stands twice in one table: {list(table)}")
        if holders[0] or self._refs[0] or 0 in self._free or self._names[0] is not None:
            raise PoolError("the dummy block 0 is in use")
        for block in range(1, self.num_blocks):
            self._check_block(block, holders[block])
        if len(self._by_name) != sum(name is not None for name in self._names):
            raise PoolError("the hash table names a block that does not bear the name")

    def _check_block(self, block: int, holders: int) -> None:
        if self._refs[block] != holders:
            raise PoolError(f"block {block} counts {self._refs[block]} holders, {holders} tables hold it")
        if (block in self._free) == (holders > 0):
            raise PoolError(f"block {block} is {'both free and' if holders else 'neither free nor'} held")
        name = self._names[block]
        if name is not None and self._by_name.get(name) != block:
            raise PoolError(f"block {block} is not found by its name")
