"""The size of the KV pool, and the check that weights and pools fit into memory."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.cli.memory_budget import (
    MIN_POOL,
    PLAIN,
    Hardware,
    dequantised_warning,
    kv_pool_bytes,
    kv_token_bytes,
    loaded_bytes,
)
from daemon.config import Config, ConfigError, options
from daemon.models.architecture import LayerConfig, ModelConfig, RopeConfig

MIB, GIB = 1 << 20, 1 << 30
MODEL_CONFIG = ModelConfig(
    path=Path("m"), name="m", family="llama", vocab_size=1000, hidden_size=64, intermediate_size=128, num_heads=4,
    num_kv_heads=2, head_dim=16, rms_norm_eps=1e-5, layers=(LayerConfig(),) * 2, ropes=(RopeConfig(1e4, 16),),
    max_position=512, tie_embeddings=True, eos_token_ids=(2,), query_scale=0.25,
)  # fmt: skip
TOKEN = 2 * 2 * 2 * 16 * 4  # bytes of KV of one token: K and V, layers, heads, head_dim, fp32


def test_the_default_is_a_quarter_of_the_memory_divided_between_engines_up_to_a_limit():
    assert kv_pool_bytes(Config(), MODEL_CONFIG, 2, 8 * GIB) == 1 * GIB
    assert kv_pool_bytes(Config(), MODEL_CONFIG, 4, 8 * GIB) == GIB // 2
    assert kv_pool_bytes(Config(), MODEL_CONFIG, 1, 500 * GIB) == 2 * GIB
    meaning = next(o for o in options() if o.name == "kv_memory").metadata["meaning"]
    assert "a quarter" in meaning and "2 GiB" in meaning


def test_kv_memory_sets_the_size():
    assert kv_pool_bytes(Config(kv_memory=7 * MIB), MODEL_CONFIG, 2, 8 * GIB) == 7 * MIB


@pytest.mark.parametrize("engine", ["stub", "hash"])
def test_engines_without_a_model_get_a_small_pool(engine: str):
    assert kv_pool_bytes(Config(engine=engine), MODEL_CONFIG, 64, 0) == MIN_POOL
    assert kv_pool_bytes(Config(engine=engine, kv_memory=5), MODEL_CONFIG, 64, 0) == 5


def test_engines_on_gpus_get_a_small_pool():
    on_gpus = Config(devices=["cuda:0", "cuda:1"], kv_memory=100 * GIB)
    assert kv_pool_bytes(on_gpus, MODEL_CONFIG, 2, 1 * GIB) == MIN_POOL


def test_a_pool_that_is_too_small_is_refused():
    smallest = 256 * TOKEN
    assert kv_pool_bytes(Config(kv_memory=smallest), MODEL_CONFIG, 1, 8 * GIB) == smallest
    with pytest.raises(ConfigError, match=r"^kv_memory: .* 255 tokens of m"):
        kv_pool_bytes(Config(kv_memory=smallest - 1), MODEL_CONFIG, 1, 8 * GIB)


def test_engines_that_do_not_fit_into_memory_are_refused():
    with pytest.raises(ConfigError, match=r"does not fit: 3 engines .* lower kv_memory or list fewer devices"):
        kv_pool_bytes(Config(kv_memory=2 * GIB), MODEL_CONFIG, 3, 6 * GIB)


def smallest_memory(config: Config, model_config: ModelConfig) -> int:
    """Return the smallest free memory, in MiB, into which one engine fits."""

    def fits(mib: int) -> bool:
        try:
            return bool(kv_pool_bytes(config, model_config, 1, mib * MIB))
        except ConfigError:
            return False

    return bisect_left(range(1 << 20), True, key=fits)


def test_fp32_weights_need_twice_the_memory():
    large = replace(MODEL_CONFIG, hidden_size=2048, intermediate_size=8192, layers=(LayerConfig(),) * 20)
    pool = 64 * MIB
    bf16, fp32, deterministic = (
        smallest_memory(Config(kv_memory=pool, **settings), large)
        for settings in ({"dtype": "bf16"}, {"dtype": "fp32"}, {"deterministic": True})
    )
    assert fp32 == deterministic
    assert fp32 - bf16 == pytest.approx(2 * large.num_params / MIB, rel=0.2)
    assert bf16 * MIB > 2 * large.num_params + pool


@given(st.integers(1, 64), st.integers(0, 2**42), st.sampled_from([0, 4 * MIB, GIB]))
def test_the_pools_fit_into_memory(engines: int, available: int, kv_memory: int):
    try:
        pool = kv_pool_bytes(Config(kv_memory=kv_memory), MODEL_CONFIG, engines, available)
    except ConfigError:
        return
    assert pool >= 256 * TOKEN
    assert engines * (pool + 2 * MODEL_CONFIG.num_params) <= available


def test_quantised_weights_count_with_their_size_in_memory():
    quantised = replace(MODEL_CONFIG, quantisation={"quant_method": "gptq", "bits": 4}, vocab_size=2**19)
    kv = Config(kv_memory=7 * MIB, dtype="bf16")
    need = 400 * MIB + 2**19 * 64 * (2 + 4)  # an engine, and a table whose output layer is float32
    with pytest.raises(ConfigError, match="does not fit"):
        kv_pool_bytes(kv, quantised, 1, need)
    assert kv_pool_bytes(kv, quantised, 1, 2 * need) == 7 * MIB
    warning = dequantised_warning(kv, quantised, 20 * MIB)
    assert "gptq weights of m, 20 MiB" in warning and "192 MiB" in warning and "in bf16" in warning
    assert "in fp32" in dequantised_warning(replace(kv, deterministic=True), quantised, 20 * MIB)
    assert not dequantised_warning(kv, MODEL_CONFIG, 20 * MIB)
    assert not dequantised_warning(replace(kv, load_format="dummy"), quantised, 20 * MIB)
    assert not dequantised_warning(replace(kv, engine="stub"), quantised, 20 * MIB)


def test_engines_compute_in_bf16_where_the_cpu_multiplies_it():
    def bytes_of_a_token(hardware: Hardware = PLAIN, **settings: Any) -> int:
        return kv_token_bytes(Config(**settings), MODEL_CONFIG, hardware)

    bf16 = Hardware(bf16=True)
    assert bytes_of_a_token() == bytes_of_a_token(bf16, dtype="fp32") == TOKEN
    assert bytes_of_a_token(bf16, deterministic=True, dtype="bf16") == TOKEN
    assert bytes_of_a_token(bf16) == bytes_of_a_token(dtype="bf16") == TOKEN / 2


def test_a_gpu_holds_all_weights_in_bf16():
    assert loaded_bytes(Config(devices=["cuda:0"]), MODEL_CONFIG) == 2 * MODEL_CONFIG.num_params


def test_fp8_weights_stay_as_they_are_where_all_gpus_multiply_them():
    fp8 = replace(MODEL_CONFIG, quantisation={"quant_method": "fp8"})
    gpus, hardware = Config(devices=["cuda:0"]), Hardware(fp8=True)
    table = fp8.vocab_size * fp8.hidden_size
    assert loaded_bytes(gpus, fp8, hardware) == fp8.num_params + table
    assert not dequantised_warning(gpus, fp8, 20 * MIB, hardware)
    blocks = replace(fp8, quantisation={"quant_method": "fp8", "weight_block_size": [128, 128]})
    for config, model, there in [
        (gpus, fp8, PLAIN),
        (gpus, blocks, hardware),
        (replace(gpus, dtype="bf16"), fp8, hardware),
    ]:
        assert loaded_bytes(config, model, there) == 2 * model.num_params
        assert "in bf16" in dequantised_warning(config, model, 20 * MIB, there)
    assert loaded_bytes(replace(gpus, load_format="dummy"), fp8, hardware) == 2 * fp8.num_params
    assert "fp8 weights of m" in dequantised_warning(Config(devices=["cpu"]), fp8, 20 * MIB, hardware)
