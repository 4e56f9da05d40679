"""The digest of weight files: it follows their content, and nothing else."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from daemon.models import checkpoint, safetensors_file
from daemon.models.model_config import ModelError
from daemon.models.weights_digest import STRIDE, file_stamps, weights_digest
from tests.models.tiny_model import make_tiny_llama


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_tiny_llama(tmp_path / "model", seed=1)


def test_a_copy_has_the_same_digest_and_other_weights_of_the_same_shape_and_time_have_not(
    model: Path, tmp_path: Path
):
    digest, times = weights_digest(model), (model / "model.safetensors").stat()
    copy = shutil.copytree(model, tmp_path / "another name", copy_function=shutil.copyfile)
    assert weights_digest(copy) == digest
    make_tiny_llama(copy, seed=2)
    os.utime(copy / "model.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (copy / "model.safetensors").stat().st_size == times.st_size
    assert weights_digest(copy) != digest


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"])
def test_one_changed_tensor_is_found(model: Path, name: str):
    digest, file = weights_digest(model), model / "model.safetensors"
    tensor = safetensors_file.read_header(file)[name]
    data = bytearray(file.read_bytes())
    values = np.frombuffer(data, np.float32, (tensor.end - tensor.start) // 4, tensor.start)
    values *= np.float32(1.001)
    file.write_bytes(data)
    assert weights_digest(model) != digest


def test_a_large_tensor_is_read_in_samples(tmp_path: Path):
    """A change of every byte of one MiB in the middle of a tensor is found."""
    config = {"big": (5 * STRIDE // 4,)}
    values = np.zeros(config["big"], np.float32)
    digests = []
    for _ in range(2):
        checkpoint.write(tmp_path, config, "F32", lambda name: values)
        digests.append(weights_digest(tmp_path))
        values[STRIDE // 2 : STRIDE // 2 + STRIDE // 4] = 1.0
    assert digests[0] != digests[1]


def test_shards_count_all(tmp_path: Path):
    model = make_tiny_llama(tmp_path / "model", seed=1, shards=3)
    digest, stamps = weights_digest(model), file_stamps(model)
    assert len(stamps) == 3
    other = make_tiny_llama(tmp_path / "other", seed=2, shards=3)
    last = sorted(model.glob("*.safetensors"))[-1]
    (other / last.name).replace(last)
    assert weights_digest(model) != digest and file_stamps(model) != stamps


def test_damaged_weights_are_refused(model: Path):
    (model / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ModelError, match="truncated"):
        weights_digest(model)
