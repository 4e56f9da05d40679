"""What changes an engine's weights, what only its fingerprint, and what neither."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from daemon.config import Config
from daemon.engine.identity import Identity, identify
from daemon.engine.runner import PoolSpec
from daemon.models.architecture import LayerConfig, RopeConfig
from daemon.models.model_config import ModelConfig, read_model_config
from tests.models.tiny_model import LLAMA3, make_tiny_llama

SPEC = PoolSpec(10, 2, 16, 2, 64, "bfloat16", 2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    path: Path = make_tiny_llama(tmp_path_factory.mktemp("m"), weights=False, tokenizer=False, rope_scaling=LLAMA3)
    return read_model_config(path, "name")


def identity(model: ModelConfig, digest: bytes = b"a", spec: PoolSpec = SPEC, device: str = "cpu", **options: Any):
    return identify(Config(**options), model, digest, spec, device)


def test_engines_with_other_products_share_no_kv(model: ModelConfig):
    bf16, e4m3 = (identify(Config(), model, b"a", SPEC, "cuda:0", arithmetic) for arithmetic in ("bfloat16", "fp8"))
    assert bf16.weights == e4m3.weights and bf16.fingerprint != e4m3.fingerprint


def test_equal_engines_are_equal_in_every_process(model: ModelConfig):
    found = identity(model)
    assert found == identity(dataclasses.replace(model, path=Path("/elsewhere"), name="other"))
    assert found == identity(model, spec=SPEC._replace(num_blocks=99))
    assert identity(model, device="cuda:0") == identity(model, device="cuda:3")
    assert 0 < found.weights < 1 << 64 and 0 < found.fingerprint < 1 << 64
    assert found.weights != found.fingerprint


@pytest.mark.parametrize(
    "changed",
    [
        {"ropes": (RopeConfig(1e4, 16),)},
        {"ropes": (RopeConfig(5e5, 16),)},
        {"layers": (LayerConfig(window=64),) * 2},
        {"rms_norm_eps": 1e-6},
    ],
)
def test_another_architecture_is_another_model(model: ModelConfig, changed: dict[str, Any]):
    one, two = identity(model), identity(dataclasses.replace(model, **changed))
    assert one.weights != two.weights and one.fingerprint != two.fingerprint


def test_other_weights_differ(model: ModelConfig):
    found = [identity(model), identity(model, b"b"), identity(model, b"", load_format="dummy")]
    found += [identity(model, b"", engine="hash"), identity(model, b"", engine="stub")]
    found += [identity(model, script, engine="script", script="x") for script in (b"a", b"b")]
    assert len({i.weights for i in found}) == len({i.fingerprint for i in found}) == len(found)


@pytest.mark.parametrize(
    "other",
    [
        {"device": "cuda:0"},
        {"deterministic": True},
        {"dtype": "fp32"},
        {"kv_dtype": "fp8"},
        {"spec": SPEC._replace(dtype="float32", item_bytes=4)},
        {"spec": SPEC._replace(block_size=32)},
    ],
)
def test_other_arithmetic_or_kv_has_the_same_weights(model: ModelConfig, other: dict[str, Any]):
    one: Identity = identity(model)
    two: Identity = identity(model, **other)
    assert one.weights == two.weights and one.fingerprint != two.fingerprint
