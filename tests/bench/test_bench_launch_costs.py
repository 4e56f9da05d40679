"""What kernels must read, write and compute, against figures worked out by hand; and what is counted for a step."""

import itertools

import pytest

from bench.gpu_launches import DRY_STEPS, count
from bench.launch_costs import Call, Cost, Launch, Operand, costs
from bench.step_loads import Load

addresses = itertools.count(1)
BF16, INT32, FLOAT = 2, 4, 4
BLOCKS_AT_ONCE = 264
NO_LOAD = Load(0, 0, 0)


def operand(*shape, item=BF16):
    return Operand(shape, item, next(addresses))


def cost(name, operands, results=(), kernels=("kernel",), load=NO_LOAD):
    call = Call(name, tuple(operands), tuple(results), tuple(Launch("kernel", k, 0) for k in kernels), False)
    return costs(call, load, BLOCKS_AT_ONCE)


def test_a_product_reads_both_factors_and_writes_the_result():
    x, weight, out = operand(8, 4096), operand(6144, 4096), operand(8, 6144)
    moved = BF16 * (8 * 4096 + 6144 * 4096 + 8 * 6144)
    assert cost("aten.linear", [x, weight], [out]) == [Cost(moved, 2 * 8 * 6144 * 4096)]


def test_a_product_into_its_operand_writes_it_once():
    x, weight, out = operand(8, 4096), operand(4096, 1000), operand(8, 1000, item=FLOAT)
    [found] = cost("aten.mm", [x, weight, out], [out], ["cublasGemmEx"])
    assert found == Cost(BF16 * (8 * 4096 + 4096 * 1000) + FLOAT * 8 * 1000, 2 * 8 * 4096 * 1000)


def test_an_operation_with_two_kernels_counts_once():
    x, weight, out = operand(8, 64), operand(32, 64), operand(8, 32)
    assert cost("aten.linear", [x, weight], [out], ["gemm", "reduce"])[1] == Cost(0)


def test_what_is_read_and_written_counts_twice():
    x, residual, weight = operand(4, 64), operand(4, 64), operand(64)
    assert cost("fused_add_rmsnorm", [x, residual, weight]) == [Cost(BF16 * (4 * 4 * 64 + 64))]
    assert cost("aten.clamp_", [x], [x]) == [Cost(BF16 * 2 * 4 * 64)]


def test_a_lookup_reads_only_its_rows():
    table, ids, out = operand(128256, 64), operand(5, item=INT32), operand(5, 64)
    assert cost("aten.embedding", [table, ids], [out]) == [Cost(2 * BF16 * 5 * 64 + INT32 * 5)]


def test_an_append_touches_a_row_of_the_pool_for_each_token():
    q, k, v = operand(3, 32, 128), operand(3, 8, 128), operand(3, 8, 128)
    pools = [operand(1000, 16, 8, 128), operand(1000, 16, 8, 128)]
    tables, angles = [operand(99, item=INT32)], operand(4096, 128, item=FLOAT)
    expected = 2 * BF16 * 3 * (32 + 8 + 8) * 128 + 3 * FLOAT * 128
    assert cost("append", [q, k, v, *pools, *tables, angles]) == [Cost(expected)]


def attention(load, rows, kernels):
    q, pools, workspaces = operand(rows, 32, 128), [operand(1000, 16, 8, 128)] * 2, [operand(9)] * 2
    return cost("paged_run", [*workspaces, q, *pools, operand(rows, 32, 128)], (), kernels, load)


def test_attention_reads_the_keys_and_values_of_each_sequence():
    [found] = attention(Load(0, 0, 100), 100, ["BatchPrefill"])
    assert found == Cost(2 * BF16 * 100 * 32 * 128 + 2 * BF16 * 100 * 8 * 128, 4 * 32 * 128 * 100 * 101 / 2)


@pytest.mark.parametrize(("decodes", "parts"), [(1, 33), (64, 64)])
def test_decodes_write_parts_that_are_merged(decodes, parts):
    first, merge = attention(Load(decodes, 1024, 0), decodes, ["BatchPrefill", "MergeStates"])
    q, partial, kv = BF16 * decodes * 32 * 128, parts * 32 * 129 * FLOAT, 2 * BF16 * decodes * 1024 * 8 * 128
    assert first == Cost(q + kv + partial, 4 * 32 * 128 * decodes * 1024)
    assert merge == Cost(partial + q)


def test_in_a_step_of_decodes_and_a_chunk_the_rows_tell_which_sequences_a_kernel_reads():
    load = Load(64, 1024, 2048)
    [decodes], [chunk], [both] = (attention(load, rows, ["BatchPrefill"]) for rows in (64, 2048, 2112))
    assert both == Cost(decodes.nbytes + chunk.nbytes, decodes.flop + chunk.flop)


def test_the_time_is_that_of_the_slower_of_memory_and_arithmetic():
    assert Cost(6e12, 1e12).seconds(3e12, 1e12) == 2.0
    assert Cost(6e12, 9e12).seconds(3e12, 1e12) == 9.0


@pytest.mark.integration
def test_the_layers_of_a_step_are_counted():
    """On the CPU, where each operation counts as a kernel: a product of each kind for each of the two layers."""
    found = count(dry=True)
    assert list(found) == [load.name for load in DRY_STEPS]
    step = found["decode 1"]
    products = [row for row in step["kernels"] if row["kernel"].startswith(("aten.mm", "aten.linear"))]
    assert sum(row["calls"] for row in products) == 2 * 4 + 1
    assert step["graph_launches"] == step["copies"] == 0 < step["kernel_launches"] == step["kernels_on_device"]
