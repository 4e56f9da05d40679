"""The block manager against a slow and obvious model of it, and its own checker against damage."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from daemon.kvpool.block_manager import BlockManager, PoolError, block_hashes

SIZE = 4


class Blocks(RuleBasedStateMachine):
    """Holders come and go with prefixes drawn from few tokens, so that many are shared.

    The model: a list of tables, the names ever given to each block, and the free blocks in the order in which
    they should be handed out.
    """

    @initialize(num_blocks=st.integers(2, 12))
    def start(self, num_blocks: int):
        self.blocks = BlockManager(num_blocks, SIZE)
        self.tables: list[list[int]] = []
        self.names: dict[int, bytes] = {}
        self.free = list(range(1, num_blocks))

    def model_refs(self, block: int) -> int:
        return sum(table.count(block) for table in self.tables)

    @rule(tokens=st.lists(st.integers(0, 1), max_size=6 * SIZE), salt=st.sampled_from([b"", b"a"]))
    def admit(self, tokens, salt):
        hashes = block_hashes(tokens, SIZE, salt)
        expected = []
        for name in hashes:
            block = next((b for b, n in self.names.items() if n == name), None)
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
            self.names.pop(block, None)
        table = matched + taken
        self.tables.append(table)
        full = len(tokens) // SIZE
        self.blocks.register(table[:full], hashes)
        for block, name in zip(table[:full], hashes, strict=True):
            if name not in self.names.values():
                self.names[block] = name

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def leave(self, data):
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.blocks.free(table)
        for block in reversed(table):
            if self.model_refs(block) == 0:
                self.free.insert(len(self.free) if block in self.names else 0, block)

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


def test_hashes_name_the_whole_prefix_and_grow_incrementally():
    tokens = list(range(10))
    names = block_hashes(tokens, SIZE)
    assert len(names) == 2 and all(len(name) == 16 for name in names)
    assert block_hashes(tokens, SIZE, have=names[:1]) == names
    assert block_hashes([9, *tokens[1:]], SIZE)[1] != names[1]
    assert not set(block_hashes(tokens, SIZE, b"tenant")) & set(names)
    assert not set(block_hashes(tokens[SIZE:], SIZE, names[0])) & set(names)  # a salt is no parent


def test_a_cached_prefix_dies_tail_first_and_after_what_caches_nothing():
    blocks = BlockManager(5, SIZE)
    hashes = block_hashes(range(3 * SIZE), SIZE)
    table = blocks.allocate(4)
    blocks.register(table[:3], hashes)
    blocks.free(table)
    assert blocks.allocate(2) == [table[3], table[2]]
    assert blocks.match(hashes) == table[:2]


def test_a_hit_makes_a_block_recent():
    blocks = BlockManager(4, SIZE)
    names = [block_hashes([i] * SIZE, SIZE)[0] for i in range(3)]
    blocks.register(table := blocks.allocate(3), names)
    for block in table:
        blocks.free([block])
    blocks.acquire(blocks.match(names[:1]))
    blocks.free(table[:1])
    assert blocks.allocate(2) == table[1:]
    assert blocks.match(names[:1]) == table[:1]


def test_equal_blocks_computed_twice_both_stay_and_one_is_found():
    blocks = BlockManager(4, SIZE)
    name = block_hashes([7] * SIZE, SIZE)
    first, second = blocks.allocate(2)
    blocks.register([first], name)
    blocks.register([second], name)
    blocks.check([[first], [second]])
    assert blocks.match(name) == [first]


def test_without_prefix_caching_nothing_is_found():
    blocks = BlockManager(4, SIZE, prefix_caching=False)
    name = block_hashes([7] * SIZE, SIZE)
    blocks.register(blocks.allocate(1), name)
    assert blocks.match(name) == []


def test_misuse_is_refused():
    blocks = BlockManager(4, SIZE)
    one, two = block_hashes(range(2 * SIZE), SIZE)
    [block] = blocks.allocate(1)
    blocks.register([block], [one])
    with pytest.raises(PoolError, match="second name"):
        blocks.register([block], [two])
    with pytest.raises(PoolError, match="not held"):
        blocks.register([block + 1], [two])
    with pytest.raises(PoolError, match="3 blocks wanted, 2 free"):
        blocks.allocate(3)
    with pytest.raises(ValueError, match="dummy"):
        BlockManager(1, SIZE)


def _leak(blocks, table):
    return []


def _double_hold(blocks, table):
    return [table, table]


def _repeat(blocks, table):
    return [table + table[:1]]


def _free_and_held(blocks, table):
    blocks._free[table[0]] = None
    return [table]


def _lost(blocks, table):
    blocks._free.popitem()
    return [table]


def _dummy(blocks, table):
    blocks._refs[0] = 1
    return [table]


def _astray(blocks, table):
    blocks._by_name[b"x"] = table[1]
    return [table]


def _unfindable(blocks, table):
    blocks._by_name.clear()
    return [table]


@pytest.mark.parametrize(
    "damage, message",
    [
        (_leak, "counts 1 holders, 0 tables"),
        (_double_hold, "counts 1 holders, 2 tables"),
        (_repeat, "twice in one table"),
        (_free_and_held, "both free and held"),
        (_lost, "neither free nor held"),
        (_dummy, "dummy"),
        (_astray, "does not bear the name"),
        (_unfindable, "not found by its name"),
    ],
)
def test_the_checker_sees(damage, message):
    blocks = BlockManager(6, SIZE)
    table = blocks.allocate(2)
    blocks.register(table[:1], block_hashes(range(SIZE), SIZE))
    blocks.check([table])
    with pytest.raises(PoolError, match=message):
        blocks.check(damage(blocks, table))
