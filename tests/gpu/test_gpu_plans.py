"""FlashInfer's plan of a bucket does not depend on the lengths of the decodes, which graph replays rely on, and each
plan fits into the workspace that is computed for it."""

import random
from itertools import pairwise

import pytest
import torch

from bench.attention_pass import PassDriver, Span
from daemon.engine.cuda.attention import FlashInferAttention, _blocks_at_once
from daemon.engine.cuda.buckets import graph_buckets
from daemon.engine.cuda.workspace import HeadShape, Workspace, chunk_workspace, decode_workspace
from daemon.models.model_config import ModelError
from tests.gpu.parts import BF16, DEVICE

MAX_LEN = 2048


def make_attention(heads, *, kv_dtype=BF16, max_rows=256, max_tokens=16):
    return FlashInferAttention(
        heads,
        dtype=BF16,
        kv_dtype=kv_dtype,
        device=torch.device(DEVICE),
        num_staging_sets=2,
        max_rows=max_rows,
        max_tokens=max_tokens,
    )


@pytest.mark.parametrize("kv_dtype", [BF16, torch.float8_e4m3fn], ids=["bf16", "e4m3"])
@pytest.mark.parametrize(
    "heads",
    [HeadShape(4, 2, 64, 16), HeadShape(32, 8, 128, 16), HeadShape(32, 8, 128, 32)],
    ids=lambda h: "-".join(map(str, h)),
)
def test_the_plan_of_a_bucket_does_not_depend_on_lengths(heads, kv_dtype):
    """`plan` compares its result with the plan at capture, and raises if they differ."""
    attention = make_attention(heads, kv_dtype=kv_dtype)
    driver, rng = PassDriver(heads, rows=256, max_len=MAX_LEN, tokens=16), random.Random(0)
    blocks = 1 + 256 * MAX_LEN // heads.block_size
    for bucket in graph_buckets(256):
        driver.prepare(attention, bucket)
    for bucket in graph_buckets(256):
        for lengths in (
            [1] * bucket,
            [MAX_LEN] * bucket,
            [1024] * (1 + bucket // 2),
            [MAX_LEN],
            [*[16] * (bucket - 1), MAX_LEN],
            [],
            [rng.randint(1, MAX_LEN) for _ in range(bucket)],
        ):
            driver.plan_decodes(attention, driver.rows([Span(n) for n in lengths], blocks), bucket)


WORKSPACE_SHAPES = [
    HeadShape(4, 2, 64, 16),
    HeadShape(64, 8, 128, 16),
    HeadShape(32, 32, 128, 16),
    HeadShape(40, 1, 64, 32),
]


def used_by(info, heads):
    """Return what a plan of the fa2 kernels takes of its workspaces."""
    numbers = list(map(int, info))
    tiles, tile_rows, kv_chunk_offset, scores_offset, valid_offset, split = (
        numbers[i] for i in (0, 3, 9, 11, 12, 14)
    )
    if not split:
        return Workspace(0, kv_chunk_offset + 4)
    return Workspace(scores_offset + heads.heads * tiles * tile_rows * 4, valid_offset + tiles)


@pytest.mark.parametrize("rows", [1, 48, 512])
@pytest.mark.parametrize("heads", WORKSPACE_SHAPES, ids=lambda h: "-".join(map(str, h)))
def test_the_plans_of_decodes_take_what_is_computed(heads, rows):
    attention = make_attention(heads, max_rows=rows)
    driver = PassDriver(heads, rows=rows, max_len=64, tokens=16)
    buckets = graph_buckets(rows)
    for bucket in buckets:
        driver.prepare(attention, bucket)
    used = [used_by(attention._first.plans[bucket], heads) for bucket in buckets]
    computed = decode_workspace(heads, rows=rows, blocks_at_once=_blocks_at_once(torch.device(DEVICE)))
    assert max(floats for floats, _ in used) == computed.floats
    assert 0 <= computed.ints - max(ints for _, ints in used) < 64  # padding between arrays


@pytest.mark.parametrize("tokens", [16, 300, 2048])
@pytest.mark.parametrize("heads", WORKSPACE_SHAPES, ids=lambda h: "-".join(map(str, h)))
def test_the_plans_of_chunks_fit_into_what_is_computed(heads, tokens):
    rows, rng = 64, random.Random(tokens)
    attention = make_attention(heads, max_rows=rows, max_tokens=tokens)
    driver = PassDriver(heads, rows=rows, max_len=MAX_LEN, tokens=tokens)
    blocks = 1 + rows * MAX_LEN // heads.block_size
    computed = chunk_workspace(heads, rows=rows, tokens=tokens, blocks_at_once=_blocks_at_once(torch.device(DEVICE)))
    used = []
    for count in (1, 2, 7, min(rows, tokens)):
        for length in (0, 1, 40, MAX_LEN):
            for even in (True, False):
                new = [tokens // count] * count if even else cuts(tokens, count, rng)
                spans = [Span(max(n, min(length, MAX_LEN)), n) for n in new]
                driver.plan_chunks(attention, driver.rows(spans, blocks))
                used.append(used_by(attention._first.prefill_call.schedule, heads))
    assert max(floats for floats, _ in used) <= computed.floats
    assert max(ints for _, ints in used) <= computed.ints


def cuts(total, count, rng):
    """Return `count` positive numbers with the sum `total`."""
    ends = [0, *sorted(rng.sample(range(1, total), count - 1)), total]
    return [b - a for a, b in pairwise(ends)]


def test_a_workspace_that_is_too_small_is_a_model_error_that_names_the_cause(monkeypatch):
    module = "daemon.engine.cuda.attention.decode_workspace"
    monkeypatch.setattr(module, lambda *args, **options: Workspace(1 << 20, 1 << 20))
    heads = HeadShape(64, 8, 128, 16)
    attention = make_attention(heads, max_rows=512)
    driver = PassDriver(heads, rows=512, max_len=64, tokens=16)
    with pytest.raises(ModelError, match="needs a larger workspace than llumd computes"):
        driver.prepare(attention, 512)
