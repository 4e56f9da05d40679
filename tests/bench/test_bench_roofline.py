"""The least time of a step, against figures worked out by hand."""

from pathlib import Path

import pytest

from bench.gpu_model import LLAMA_8B, model_config_of
from bench.roofline import decode_seconds, head_params, kv_bytes, layer_params, prefill_flop


@pytest.fixture
def config(tmp_path: Path):
    return model_config_of(LLAMA_8B, tmp_path)


def test_parameters_and_kv_of_the_8b(config):
    assert layer_params(config) == 6_979_321_856
    assert head_params(config) == 525_336_576
    assert kv_bytes(config) == 131_072
    assert kv_bytes(config, 1) == 65_536


@pytest.mark.parametrize(
    ("batch", "context", "bandwidth", "ms"),
    [
        (1, 1024, 4.8e12, 3.16),
        (64, 1024, 4.8e12, 4.92),
        (256, 1024, 4.3e12, 11.48),
        (32, 8192, 3.35e12, 14.74),
    ],
)
def test_decodes_bound_by_memory(config, batch, context, bandwidth, ms):
    assert decode_seconds(config, batch, context, bandwidth=bandwidth, rate=1e18) * 1e3 == pytest.approx(
        ms, abs=0.006
    )


def test_decodes_bound_by_arithmetic(config):
    """256 rows of 256 tokens: 4.9 ms for the matrices at 790 TFLOP/s, and a little for attention."""
    assert decode_seconds(config, 256, 256, bandwidth=1e18, rate=790e12) * 1e3 == pytest.approx(4.91, abs=0.01)


def test_smaller_kv_is_read_faster(config):
    slow, fast = (decode_seconds(config, 64, 4096, bandwidth=4e12, rate=1e18, kv_item_bytes=n) for n in (2, 1))
    assert slow - fast == pytest.approx(64 * 4096 * 65_536 / 4e12)


@pytest.mark.parametrize(("tokens", "ms"), [(512, 9.1), (2048, 37.6), (8192, 167.0)])
def test_prefill(config, tokens, ms):
    """What the study of peers found, which counted the whole square of attention, or none, within 10 %."""
    assert prefill_flop(config, tokens) / 790e12 * 1e3 == pytest.approx(ms, rel=0.1)
