"""Weights: read, refused and random ones; and the estimates of memory."""

import json
from pathlib import Path

import pytest
import torch

from daemon.engine.cpu.memory import activation_bytes, weights_bytes
from daemon.engine.cpu.model import Decoder
from daemon.engine.weights import open_weights
from daemon.models.loader import open_model
from daemon.models.model_config import ModelError, read_model_config
from daemon.models.tensors import expected_tensors
from tests.engine.cpu.harness import make_runner
from tests.models.tiny_model import make_tiny_llama, random_weights, write_weights

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_tensor_is_read_as_stored(tmp_path, shards, dtype):
    path = make_tiny_llama(tmp_path, shards=shards, dtype=dtype, seed=4, tie=False)
    weights = open_weights(open_model(path), "auto")
    stored = random_weights(json.loads((path / "config.json").read_text()), 4)
    for name, value in stored.items():
        tensor = weights.get(name)
        assert tensor.dtype is getattr(torch, dtype)
        assert torch.equal(tensor, torch.from_numpy(value).to(tensor.dtype))


def test_a_checkpoint_is_mapped_and_not_copied(tmp_path):
    path = make_tiny_llama(tmp_path)
    tensor = open_weights(open_model(path), "auto").get("model.embed_tokens.weight")
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if "model.safetensors" in line]
    ranges = [tuple(int(x, 16) for x in line.split()[0].split("-")) for line in mapped]
    assert any(low <= tensor.data_ptr() < high for low, high in ranges)


@pytest.mark.parametrize("change", ["missing", "misshapen"])
def test_the_error_for_a_wrong_checkpoint_names_the_tensor(tmp_path, change):
    path = make_tiny_llama(tmp_path)
    config = open_model(path)
    stored = random_weights(json.loads((path / "config.json").read_text()), 0)
    name = "model.layers.1.mlp.up_proj.weight"
    if change == "missing":
        del stored[name]
    else:
        stored[name] = stored[name][:-1]
    write_weights(path, stored)
    with pytest.raises(ModelError, match=name.replace(".", r"\.")):
        open_weights(config, "auto")


def test_dummy_weights_depend_only_on_the_name(tmp_path):
    config = read_model_config(make_tiny_llama(tmp_path, weights=False))
    one, two = open_weights(config, "dummy"), open_weights(config, "dummy")
    names = [n for n in expected_tensors(config) if "proj" in n]
    for name in names:
        assert torch.equal(one.get(name), two.get(name))
    first_elements = [float(one.get(name).flatten()[0]) for name in names]
    assert len(set(first_elements)) == len(first_elements)


@pytest.mark.parametrize("arithmetic, tie", [("fp32", True), ("fp32", False), ("bf16", True)])
def test_the_estimate_equals_the_size_of_the_weights(tmp_path, arithmetic, tie):
    path = make_tiny_llama(tmp_path, tie=tie)
    config = open_model(path)
    model: Decoder = make_runner(path, dtype=arithmetic)._model
    linears = [x for layer in model._layers for x in (layer.qkv, layer.out, *layer.mlp.linears)]
    params = sum(x.in_features * x.out_features for x in linears) + config.hidden_size * (2 * config.num_layers + 1)
    head = model._head.in_features * model._head.out_features * 4
    assert weights_bytes(config, arithmetic) == params * (4 if arithmetic == "fp32" else 2) + head


def test_activations_grow_with_the_step(tmp_path):
    config = read_model_config(make_tiny_llama(tmp_path, weights=False))

    def size(tokens, seqs, length):
        return activation_bytes(config, "fp32", max_batch_tokens=tokens, max_num_seqs=seqs, max_model_len=length)

    assert size(512, 64, 512) < min(size(513, 64, 512), size(512, 65, 512), size(512, 64, 513))
