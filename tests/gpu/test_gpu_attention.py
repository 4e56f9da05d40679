"""FlashInfer's attention against the slow reference, over one blocks-first pool."""

import random
from dataclasses import replace

import pytest
import torch

from bench.attention_pass import PassDriver, Span
from daemon.engine.cuda import kernels
from daemon.engine.cuda.attention import FlashInferAttention, Scoring, TorchAttention
from daemon.engine.cuda.ops import TorchOps
from daemon.engine.cuda.workspace import HeadShape
from daemon.models.architecture import LayerConfig
from tests.gpu.parts import BF16, DEVICE, model_config_of

LAYERS, LAYER = 3, 1
MAX_LEN = 8192
SHAPES = [
    HeadShape(4, 2, 64, 16),
    HeadShape(9, 3, 64, 16),
    HeadShape(4, 4, 64, 32),
    HeadShape(32, 8, 128, 16),
    HeadShape(32, 8, 128, 32),
]
DECODES = {
    "short": [1, 2, 15, 16, 17, 31, 32, 33],
    "one long": [6000],
    "mixed": [1, 700, 16, 3000, 48, 5, 129],
}
CHUNKS = {
    "whole prompts": [(1, 1), (16, 16), (300, 300), (17, 17)],
    "behind a prefix": [(700, 60), (33, 1), (2000, 128), (64, 16)],
    "long": [(6000, 400)],
}


@pytest.fixture(params=[BF16, torch.float8_e4m3fn], ids=["bf16", "e4m3"])
def kv_dtype(request):
    return request.param


def pools(heads, blocks, kv_dtype):
    """Return two equal pools, full of old KV."""
    shape = (blocks, LAYERS, 2, heads.block_size, heads.kv_heads, heads.head_dim)
    first = torch.randn(shape, generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE).to(kv_dtype)
    return first, first.clone()


def engines(heads, kv_dtype, prefill="fa2", scoring=None):
    fast = FlashInferAttention(
        heads,
        dtype=BF16,
        kv_dtype=kv_dtype,
        device=torch.device(DEVICE),
        num_staging_sets=2,
        max_rows=256,
        max_tokens=8192,
        scoring=scoring,
        prefill_backend=prefill,
    )
    return fast, TorchAttention(heads, scoring)


def qkv(heads, count):
    """Return slices of one fused product, as the model passes them."""
    total = heads.heads + 2 * heads.kv_heads
    fused = torch.randn(count, total, heads.head_dim, device=DEVICE).to(BF16)
    return fused.split([heads.heads, heads.kv_heads, heads.kv_heads], 1)


def compare(attentions, both, heads, inputs, *, decode, real, layer=LAYER):
    q, k, v = qkv(heads, len(inputs.tokens))
    half = torch.ones(MAX_LEN, heads.head_dim // 2, device=DEVICE)
    unrotated = torch.cat([half, torch.zeros_like(half)], 1)
    for attention, pool in zip(attentions, both, strict=True):
        attention.use_pool(pool)
        keys, values = attention.pages(layer)
        TorchOps().append(q.clone(), k.clone(), v.clone(), keys, values, inputs, unrotated)
    got, expected = torch.empty(2, *q.shape, dtype=BF16, device=DEVICE)
    for attention, out in zip(attentions, (got, expected), strict=True):
        attention.attend(layer, q, inputs, out, decode=decode)
    torch.testing.assert_close(got[:real].float(), expected[:real].float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("lengths", DECODES, ids=str)
@pytest.mark.parametrize("heads", SHAPES, ids=lambda h: "-".join(map(str, h)))
def test_decodes(heads, lengths, kv_dtype):
    sequences = [Span(n) for n in DECODES[lengths]]
    blocks = 1 + sum(-(-n // heads.block_size) for n, _ in sequences)
    attentions, both = engines(heads, kv_dtype), pools(heads, blocks, kv_dtype)
    driver = PassDriver(heads, rows=8, max_len=MAX_LEN, tokens=512)
    for attention, pool in zip(attentions, both, strict=True):
        attention.use_pool(pool)
    driver.prepare(attentions[0], 8)
    inputs = driver.plan_decodes(attentions[0], driver.rows(sequences, blocks), 8)
    compare(attentions, both, heads, inputs, decode=True, real=len(sequences))


@pytest.mark.parametrize("heads", [SHAPES[0], SHAPES[3]], ids=lambda h: "-".join(map(str, h)))
def test_long_decodes_among_many_short_ones(heads, kv_dtype):
    """More decodes than FlashInfer splits by itself: the long ones are split into the spare parts of the graph."""
    bucket, rng = 200, random.Random(0)
    sequences = [Span(rng.randint(1, 60)) for _ in range(bucket - 3)]
    for place, length in ((0, 6000), (77, 3001), (190, 1500)):
        sequences.insert(place, Span(length))
    blocks = 1 + sum(-(-n // heads.block_size) for n, _ in sequences)
    attentions, both = engines(heads, kv_dtype), pools(heads, blocks, kv_dtype)
    driver = PassDriver(heads, rows=bucket, max_len=MAX_LEN, tokens=512)
    for attention, pool in zip(attentions, both, strict=True):
        attention.use_pool(pool)
    driver.prepare(attentions[0], bucket)
    rows = driver.rows(sequences, blocks)
    inputs = driver.plan_decodes(attentions[0], rows, bucket)
    longest = -(-6000 // heads.block_size)
    assert attentions[0]._part_pages(attentions[0]._first, driver.current.decodes.tensors, bucket) < longest / 2
    compare(attentions, both, heads, inputs, decode=True, real=bucket)


@pytest.mark.parametrize("parts", CHUNKS, ids=str)
@pytest.mark.parametrize("heads", SHAPES, ids=lambda h: "-".join(map(str, h)))
def test_chunks(heads, parts, kv_dtype):
    check_chunks(engines(heads, kv_dtype), heads, parts, kv_dtype)


@pytest.mark.parametrize("parts", CHUNKS, ids=str)
@pytest.mark.parametrize("heads", [SHAPES[0], *SHAPES[3:]], ids=lambda h: "-".join(map(str, h)))
def test_chunks_by_fa3(heads, parts):
    arch = kernels.arch_of(*torch.cuda.get_device_capability())
    try:
        kernels.check(kernels.required(model_config_of(heads.head_dim), arch=arch, prefill="fa3"), arch)
    except kernels.KernelError as e:
        pytest.skip(str(e))
    check_chunks(engines(heads, BF16, "fa3"), heads, parts, BF16)


def check_chunks(attentions, heads, parts, kv_dtype):
    sequences = [Span(*part) for part in CHUNKS[parts]]
    blocks = 1 + sum(-(-n // heads.block_size) for n, _ in sequences)
    both = pools(heads, blocks, kv_dtype)
    driver = PassDriver(heads, rows=8, max_len=MAX_LEN, tokens=512)
    inputs = driver.plan_chunks(attentions[0], driver.rows(sequences, blocks))
    compare(attentions, both, heads, inputs, decode=False, real=len(inputs.tokens))


def windowed(heads, kv_dtype, cap):
    """Return engines whose layers have no window, a window of 300 tokens, and one of less than a block."""
    arch = kernels.arch_of(*torch.cuda.get_device_capability())
    layers = tuple(LayerConfig(window) for window in (0, 300, 7))
    config = replace(model_config_of(heads.head_dim), layers=layers, attention_softcap=cap)
    kv = "auto" if kv_dtype == BF16 else "fp8"
    try:
        kernels.check(kernels.required(config, arch=arch, kv_dtype=kv), arch)
    except kernels.KernelError as e:
        pytest.skip(str(e))
    return engines(heads, kv_dtype, scoring=Scoring.of(replace(config, query_scale=0.2)))


@pytest.mark.parametrize("cap", [0.0, 5.0])
@pytest.mark.parametrize("heads", [SHAPES[0], SHAPES[3]], ids=lambda h: "-".join(map(str, h)))
@pytest.mark.parametrize("lengths", DECODES, ids=str)
def test_decodes_with_windows_and_caps(heads, lengths, cap, kv_dtype):
    sequences = [Span(n) for n in DECODES[lengths]]
    blocks = 1 + sum(-(-n // heads.block_size) for n, _ in sequences)
    attentions, both = windowed(heads, kv_dtype, cap), pools(heads, blocks, kv_dtype)
    driver = PassDriver(heads, rows=8, max_len=MAX_LEN, tokens=512)
    for attention, pool in zip(attentions, both, strict=True):
        attention.use_pool(pool)
    driver.prepare(attentions[0], 8)
    inputs = driver.plan_decodes(attentions[0], driver.rows(sequences, blocks), 8)
    for layer in range(LAYERS):
        compare(attentions, both, heads, inputs, decode=True, real=len(sequences), layer=layer)


@pytest.mark.parametrize("cap", [0.0, 5.0])
@pytest.mark.parametrize("heads", [SHAPES[0], SHAPES[3]], ids=lambda h: "-".join(map(str, h)))
@pytest.mark.parametrize("parts", CHUNKS, ids=str)
def test_chunks_with_windows_and_caps(heads, parts, cap, kv_dtype):
    sequences = [Span(*part) for part in CHUNKS[parts]]
    blocks = 1 + sum(-(-n // heads.block_size) for n, _ in sequences)
    attentions, both = windowed(heads, kv_dtype, cap), pools(heads, blocks, kv_dtype)
    driver = PassDriver(heads, rows=8, max_len=MAX_LEN, tokens=512)
    inputs = driver.plan_chunks(attentions[0], driver.rows(sequences, blocks))
    for layer in range(LAYERS):
        compare(attentions, both, heads, inputs, decode=False, real=len(inputs.tokens), layer=layer)


def test_long_decodes_with_a_window_among_many_short_ones():
    """Only what is in the window is split into the spare parts of the graph."""
    heads, bucket, kv_dtype = SHAPES[0], 200, BF16
    sequences = [Span(1 + i % 60) for i in range(bucket)]
    for place, length in ((0, 6000), (77, 3001), (190, 1500)):
        sequences[place] = Span(length)
    blocks = 1 + sum(-(-n // heads.block_size) for n, _ in sequences)
    attentions, both = windowed(heads, kv_dtype, 0.0), pools(heads, blocks, kv_dtype)
    driver = PassDriver(heads, rows=bucket, max_len=MAX_LEN, tokens=512)
    for attention, pool in zip(attentions, both, strict=True):
        attention.use_pool(pool)
    driver.prepare(attentions[0], bucket)
    inputs = driver.plan_decodes(attentions[0], driver.rows(sequences, blocks), bucket)
    for layer in range(LAYERS):
        compare(attentions, both, heads, inputs, decode=True, real=bucket, layer=layer)


def test_each_chunk_plan_replaces_the_previous_one(kv_dtype):
    """Plans of different sizes follow one another."""
    heads = SHAPES[0]
    attentions, both = engines(heads, kv_dtype), pools(heads, 600, kv_dtype)
    driver = PassDriver(heads, rows=8, max_len=MAX_LEN, tokens=512)
    for seed, parts in enumerate([*CHUNKS.values(), *reversed(CHUNKS.values())]):
        inputs = driver.plan_chunks(attentions[0], driver.rows([Span(*p) for p in parts], 600, seed))
        compare(attentions, both, heads, inputs, decode=False, real=len(inputs.tokens))
