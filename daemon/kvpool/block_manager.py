"""The block manager: allocation of KV blocks, their reference counts and the prefix cache. Pure.

It knows block ids only; the runner knows the bytes. Block 0 is a dummy for padding and is never allocated. A block is
*held* while its reference count is above zero, otherwise it is *free*. A free block keeps its content and its hash
until it is allocated again, so the free blocks are the prefix cache, least recently used first.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Container, Iterable, Sequence
from hashlib import blake2b
from itertools import islice

HASH_BYTES = 16


class PoolError(RuntimeError):
    """The block accounting is violated; the message names the block."""


def block_hashes(
    tokens: Sequence[int], block_size: int, salt: bytes = b"", have: Sequence[bytes] = (), *, fingerprint: int = 0
) -> list[bytes]:
    """Return the hashes of the full blocks of `tokens`, 16 bytes each.

    The hash of a block is H(hash of the previous block, tokens of this block), so equal hashes mean equal tokens from
    the first token on, within one `salt`, and a KV of equal `fingerprint`. `have`: the hashes of the first blocks, if
    they are already known. Token ids must fit in 32 bits.
    """
    hashes = list(have)
    parent = hashes[-1] if hashes else _root(salt, fingerprint)
    for start in range(len(hashes) * block_size, len(tokens) - block_size + 1, block_size):
        content = array("I", tokens[start : start + block_size]).tobytes()
        parent = blake2b(parent + content, digest_size=HASH_BYTES).digest()
        hashes.append(parent)
    return hashes


def _root(salt: bytes, fingerprint: int) -> bytes:
    """Return the parent hash of first blocks. It is personalised, so no salt can equal the hash of a block."""
    key = fingerprint.to_bytes(8, "little")
    return blake2b(salt, digest_size=HASH_BYTES, key=key, person=b"kv-root").digest()


class BlockManager:
    """Allocates the blocks of one pool.

    Block tables are append-only. If two requests compute equal blocks at the same time, the prefix cache finds the
    one that is registered first. Both blocks stay: to replace one would rewrite a block table that is in use.
    """

    def __init__(
        self, num_blocks: int, block_size: int, prefix_caching: bool = True, *, fingerprint: int = 0
    ) -> None:
        """`fingerprint`: of all that the KV in the blocks depends on besides the tokens."""
        if num_blocks < 2:
            raise ValueError(f"a pool needs a dummy block and at least one more, not {num_blocks} blocks")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.fingerprint = fingerprint
        self._refs = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks  # None: not in the prefix cache
        self._by_hash: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))  # in order of allocation

    def hashes(self, tokens: Sequence[int], salt: bytes, have: Sequence[bytes]) -> list[bytes]:
        """Return the hashes of the full blocks of `tokens` in this pool, see `block_hashes`."""
        return block_hashes(tokens, self.block_size, salt, have, fingerprint=self.fingerprint)

    # -- counts --------------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        """Number of blocks that requests can hold: all except the dummy."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Number of blocks that can be allocated now, cached blocks included."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Number of held blocks; a shared block counts once."""
        return self.capacity - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Return the number of blocks for `num_tokens` tokens; the last block may be partly full."""
        return -(-num_tokens // self.block_size)

    def can_allocate(self, n: int) -> bool:
        return n <= len(self._free)

    def num_idle(self, blocks: Iterable[int]) -> int:
        """Return how many of `blocks` are free: `acquire` would lower `num_free` by this number."""
        return sum(not self._refs[block] for block in blocks)

    # -- allocation ----------------------------------------------------------------------------

    def allocate(self, n: int, avoid: Container[int] = ()) -> list[int]:
        """Allocate `n` free blocks that are not in `avoid`; they leave the prefix cache.

        Uncached blocks go first, then the least recently used. Raises PoolError and allocates none if fewer are free.
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
        """Add one reference to each of `blocks`; blocks from `match` may be free or held."""
        for block in blocks:
            if not self._refs[block]:
                del self._free[block]
            self._refs[block] += 1

    def free(self, table: Sequence[int]) -> None:
        """Drop one reference to each block of `table`, in reverse, so that prefixes are evicted from the tail.

        Raises PoolError if a block is not held.
        """
        for block in reversed(table):
            if self._refs[block] < 1:
                raise PoolError(f"block {block} freed but not held")
            self._refs[block] -= 1
            if not self._refs[block]:
                self._free[block] = None
                if self._hashes[block] is None:  # not cached: allocate it before any cached block
                    self._free.move_to_end(block, last=False)

    # -- the prefix cache ----------------------------------------------------------------------

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """Return the blocks of the longest cached prefix of `hashes`. They are not held before `acquire`."""
        matched = []
        for block_hash in hashes:
            block = self._by_hash.get(block_hash)
            if block is None:
                break
            matched.append(block)
        return matched

    def register(self, blocks: Sequence[int], hashes: Sequence[bytes]) -> None:
        """Add held, full blocks to the prefix cache. Call it when their content is computed or copied, not before.

        To register a block again does nothing. Raises PoolError if a block is not held or has another hash.
        """
        if not self.prefix_caching:
            return
        for block, block_hash in zip(blocks, hashes, strict=True):
            if not self._refs[block]:
                raise PoolError(f"block {block} registered but not held")
            if self._hashes[block] not in (None, block_hash):
                raise PoolError(f"block {block} registered under a second hash")
            if self._by_hash.setdefault(block_hash, block) == block:
                self._hashes[block] = block_hash

    def _forget(self, block: int) -> None:
        block_hash = self._hashes[block]
        if block_hash is not None:
            self._hashes[block] = None
            del self._by_hash[block_hash]

    # -- invariants ----------------------------------------------------------------------------

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Compare the accounting with the block tables of all holders; raise PoolError at the first difference."""
        holders: Counter[int] = Counter()
        for table in tables:
            holders.update(table)
            if len(set(table)) < len(table):
                raise PoolError(f"a block is twice in one table: {list(table)}")
        if holders[0] or self._refs[0] or 0 in self._free or self._hashes[0] is not None:
            raise PoolError("the dummy block 0 is in use")
        for block in range(1, self.num_blocks):
            self._check_block(block, holders[block])
        if len(self._by_hash) != sum(block_hash is not None for block_hash in self._hashes):
            raise PoolError("the prefix cache maps a hash to a block that does not have it")

    def _check_block(self, block: int, holders: int) -> None:
        if self._refs[block] != holders:
            raise PoolError(f"block {block} counts {self._refs[block]} holders, {holders} tables hold it")
        if (block in self._free) == (holders > 0):
            raise PoolError(f"block {block} is {'both free and' if holders else 'neither free nor'} held")
        block_hash = self._hashes[block]
        if block_hash is not None and self._by_hash.get(block_hash) != block:
            raise PoolError(f"block {block} is not found by its hash")
