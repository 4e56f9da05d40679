"""The block manager against a simple model of it, and its `check` against damaged accounting."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from daemon.kvpool.block_manager import BlockManager, PoolError, block_hashes

SIZE = 4


class Blocks(RuleBasedStateMachine):
    """Requests come and go with prefixes of few different tokens, so that many blocks are shared.

    The model is a list of block tables, the hash of each cached block, and the free blocks in the order in which they
    must be allocated.
    """

    @initialize(num_blocks=st.integers(2, 12))
    def start(self, num_blocks: int):
        self.blocks = BlockManager(num_blocks, SIZE)
        self.tables: list[list[int]] = []
        self.salts: dict[int, bytes] = {}  # of the content of a block
        self.hashes: dict[int, bytes] = {}
        self.free = list(range(1, num_blocks))

    def model_refs(self, block: int) -> int:
        return sum(table.count(block) for table in self.tables)

    @rule(tokens=st.lists(st.integers(0, 1), max_size=6 * SIZE), salt=st.sampled_from([b"", b"a"]))
    def admit(self, tokens, salt):
        hashes = block_hashes(tokens, SIZE, salt)
        expected = []
        for block_hash in hashes:
            block = next((b for b, h in self.hashes.items() if h == block_hash), None)
            if block is None:
                break
            expected.append(block)
        matched = self.blocks.match(hashes)
        assert matched == expected
        idle = [b for b in matched if self.model_refs(b) == 0]
        assert self.blocks.num_idle(matched) == len(idle)
        fresh = self.blocks.blocks_for(len(tokens)) - len(matched)
        if not self.blocks.can_allocate(fresh + len(idle)):
            with pytest.raises(PoolError):
                self.blocks.allocate(len(self.free) + 1)
            return
        self.blocks.acquire(matched)
        self.free = [b for b in self.free if b not in idle]
        taken, self.free = self.free[:fresh], self.free[fresh:]
        assert self.blocks.allocate(fresh) == taken
        for block in taken:
            self.hashes.pop(block, None)
        table = matched + taken
        assert all(self.salts[block] == salt for block in matched)
        self.salts |= dict.fromkeys(taken, salt)
        self.tables.append(table)
        full = len(tokens) // SIZE
        self.blocks.register(table[:full], hashes)
        for block, block_hash in zip(table[:full], hashes, strict=True):
            if block_hash not in self.hashes.values():
                self.hashes[block] = block_hash

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def leave(self, data):
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.blocks.free(table)
        for block in reversed(table):
            if self.model_refs(block) == 0:
                self.free.insert(len(self.free) if block in self.hashes else 0, block)

    @precondition(lambda self: self.free)
    @rule()
    def free_twice(self):
        with pytest.raises(PoolError, match="not held"):
            self.blocks.free([self.free[-1]])

    @invariant()
    def agrees(self):
        if hasattr(self, "blocks"):
            self.blocks.check(self.tables)
            assert self.blocks.num_free == len(self.free)
            assert self.blocks.num_used == len({b for table in self.tables for b in table})


TestBlocks = Blocks.TestCase


def test_a_block_hash_covers_the_whole_prefix_and_is_computed_incrementally():
    tokens = list(range(10))
    hashes = block_hashes(tokens, SIZE)
    assert len(hashes) == 2 and all(len(block_hash) == 16 for block_hash in hashes)
    assert block_hashes(tokens, SIZE, have=hashes[:1]) == hashes
    assert block_hashes([9, *tokens[1:]], SIZE)[1] != hashes[1]
    assert not set(block_hashes(tokens, SIZE, b"tenant")) & set(hashes)
    assert not set(block_hashes(tokens[SIZE:], SIZE, hashes[0])) & set(hashes)  # a salt is no parent
    assert not set(block_hashes(tokens, SIZE, fingerprint=7)) & set(hashes)  # KV of other weights
    assert not set(block_hashes(tokens, SIZE, fingerprint=7)) & set(block_hashes(tokens, SIZE, fingerprint=8))


def test_uncached_blocks_are_allocated_first_and_cached_prefixes_are_evicted_from_the_tail():
    blocks = BlockManager(5, SIZE)
    hashes = block_hashes(range(3 * SIZE), SIZE)
    table = blocks.allocate(4)
    blocks.register(table[:3], hashes)
    blocks.free(table)
    assert blocks.allocate(2) == [table[3], table[2]]
    assert blocks.match(hashes) == table[:2]


def test_a_cache_hit_makes_a_block_recently_used():
    blocks = BlockManager(4, SIZE)
    hashes = [block_hashes([i] * SIZE, SIZE)[0] for i in range(3)]
    blocks.register(table := blocks.allocate(3), hashes)
    for block in table:
        blocks.free([block])
    blocks.acquire(blocks.match(hashes[:1]))
    blocks.free(table[:1])
    assert blocks.allocate(2) == table[1:]
    assert blocks.match(hashes[:1]) == table[:1]


def test_two_equal_blocks_both_stay_and_the_first_registered_is_found():
    blocks = BlockManager(4, SIZE)
    block_hash = block_hashes([7] * SIZE, SIZE)
    first, second = blocks.allocate(2)
    blocks.register([first], block_hash)
    blocks.register([second], block_hash)
    blocks.check([[first], [second]])
    assert blocks.match(block_hash) == [first]


def test_without_prefix_caching_no_block_is_found():
    blocks = BlockManager(4, SIZE, prefix_caching=False)
    block_hash = block_hashes([7] * SIZE, SIZE)
    blocks.register(blocks.allocate(1), block_hash)
    assert blocks.match(block_hash) == []


def test_misuse_raises_an_error():
    blocks = BlockManager(4, SIZE)
    one, two = block_hashes(range(2 * SIZE), SIZE)
    [block] = blocks.allocate(1)
    blocks.register([block], [one])
    with pytest.raises(PoolError, match="second hash"):
        blocks.register([block], [two])
    with pytest.raises(PoolError, match="not held"):
        blocks.register([block + 1], [two])
    with pytest.raises(PoolError, match="3 blocks wanted, 2 free"):
        blocks.allocate(3)
    with pytest.raises(ValueError, match="dummy"):
        BlockManager(1, SIZE)


def _leaked(blocks, table):
    return []


def _held_twice(blocks, table):
    return [table, table]


def _repeated(blocks, table):
    return [table + table[:1]]


def _free_and_held(blocks, table):
    blocks._free[table[0]] = None
    return [table]


def _neither(blocks, table):
    blocks._free.popitem()
    return [table]


def _dummy_in_use(blocks, table):
    blocks._refs[0] = 1
    return [table]


def _wrong_mapping(blocks, table):
    blocks._by_hash[b"x"] = table[1]
    return [table]


def _empty_mapping(blocks, table):
    blocks._by_hash.clear()
    return [table]


@pytest.mark.parametrize(
    "damage, message",
    [
        (_leaked, "counts 1 holders, 0 tables"),
        (_held_twice, "counts 1 holders, 2 tables"),
        (_repeated, "twice in one table"),
        (_free_and_held, "both free and held"),
        (_neither, "neither free nor held"),
        (_dummy_in_use, "dummy"),
        (_wrong_mapping, "does not have it"),
        (_empty_mapping, "not found by its hash"),
    ],
)
def test_check_finds_damaged_accounting(damage, message):
    blocks = BlockManager(6, SIZE)
    table = blocks.allocate(2)
    blocks.register(table[:1], block_hashes(range(SIZE), SIZE))
    blocks.check([table])
    with pytest.raises(PoolError, match=message):
        blocks.check(damage(blocks, table))
