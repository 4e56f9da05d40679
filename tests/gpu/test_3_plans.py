"""FlashInfer lays the decodes of a bucket out alike, however long they are: else a graph could not be replayed."""

import random

import pytest
import torch

from daemon.engine.cuda.attention import FlashInferAttention, Heads
from daemon.engine.cuda.buckets import graph_buckets
from tests.gpu.parts import BF16, DEVICE, Bench, Span

MAX_LEN = 2048


@pytest.mark.parametrize("kv_dtype", [BF16, torch.float8_e4m3fn], ids=["bf16", "e4m3"])
@pytest.mark.parametrize(
    "heads", [Heads(4, 2, 64, 16), Heads(32, 8, 128, 16), Heads(32, 8, 128, 32)], ids=lambda h: "-".join(map(str, h))
)
def test_a_bucket_has_one_layout(heads, kv_dtype):
    """`plan` compares it with the one at capture, and raises."""
    attention = FlashInferAttention(heads, dtype=BF16, kv_dtype=kv_dtype, device=torch.device(DEVICE), turns=2)
    bench, rng = Bench(heads, rows=256, max_len=MAX_LEN, tokens=16), random.Random(0)
    blocks = 1 + 256 * MAX_LEN // heads.block_size
    for bucket in graph_buckets(256):
        bench.prepare(attention, bucket)
    for bucket in graph_buckets(256):
        for lengths in (
            [1] * bucket,
            [MAX_LEN] * bucket,
            [1024] * (1 + bucket // 2),
            [MAX_LEN],
            [],
            [rng.randint(1, MAX_LEN) for _ in range(bucket)],
        ):
            bench.plan_decodes(attention, bench.rows([Span(n) for n in lengths], blocks), bucket)
