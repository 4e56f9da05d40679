"""FlashInfer's plan of a bucket does not depend on the lengths of the decodes. Graph replays rely on this."""

import random

import pytest
import torch

from bench.attention_pass import PassDriver, Span
from daemon.engine.cuda.attention import FlashInferAttention, HeadShape
from daemon.engine.cuda.buckets import graph_buckets
from tests.gpu.parts import BF16, DEVICE

MAX_LEN = 2048


@pytest.mark.parametrize("kv_dtype", [BF16, torch.float8_e4m3fn], ids=["bf16", "e4m3"])
@pytest.mark.parametrize(
    "heads",
    [HeadShape(4, 2, 64, 16), HeadShape(32, 8, 128, 16), HeadShape(32, 8, 128, 32)],
    ids=lambda h: "-".join(map(str, h)),
)
def test_the_plan_of_a_bucket_does_not_depend_on_lengths(heads, kv_dtype):
    """`plan` compares its result with the plan at capture, and raises if they differ."""
    attention = FlashInferAttention(
        heads, dtype=BF16, kv_dtype=kv_dtype, device=torch.device(DEVICE), num_staging_sets=2
    )
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
