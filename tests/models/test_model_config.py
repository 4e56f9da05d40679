"""Model directories that llumd serves and refuses, the errors, and checkpoints."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from daemon.models import checkpoint
from daemon.models.architecture import LayerConfig, RopeConfig
from daemon.models.loader import open_model
from daemon.models.model_config import ModelError, read_model_config
from daemon.models.tensors import expected_tensors
from tests.models.tiny_model import make_tiny_llama, random_weights

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SCALED = RopeConfig(5e5, 24, "llama3", 8.0, 64, low_freq_factor=1.0, high_freq_factor=4.0)


def edit(path, **changes):
    file = path / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))
    return config


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tie", [True, False])
def test_open_model_reads_a_directory(tmp_path, shards, tie):
    path = make_tiny_llama(
        tmp_path / "m",
        shards=shards,
        tie=tie,
        attention_bias=True,
        mlp_bias=True,
        heads=4,
        kv_heads=2,
        head_dim=24,
        rope_theta=5e5,
        rope_scaling=LLAMA3,
        eos=[2, 5],
    )
    model_config = open_model(path, "name")
    assert (
        model_config.name,
        model_config.path,
        model_config.vocab_size,
        model_config.hidden_size,
        model_config.num_heads,
    ) == ("name", path, 384, 64, 4)
    assert (
        model_config.num_kv_heads,
        model_config.head_dim,
        model_config.max_position,
        model_config.tie_embeddings,
    ) == (2, 24, 512, tie)
    assert (model_config.ropes, model_config.eos_token_ids) == ((SCALED,), (2, 5))
    assert (model_config.qkv_bias, model_config.out_bias, model_config.mlp_bias) == (True, True, True)
    assert open_model(path).name == "m"


def test_rope_parameters_of_transformers_4_and_5(tmp_path):
    old = make_tiny_llama(tmp_path / "old", rope_theta=5e5, rope_scaling=LLAMA3)
    new = make_tiny_llama(tmp_path / "new")
    edit(new, rope_parameters={**LLAMA3, "rope_theta": 5e5}, rope_theta="absent", rope_scaling="absent")
    assert open_model(old).ropes == open_model(new).ropes == (replace(SCALED, rotary_dim=16),)
    edit(new, rope_parameters={"rope_type": "default", "rope_theta": 77.0})
    assert open_model(new).ropes == (RopeConfig(77.0, 16),)
    edit(old, rope_scaling={"type": "linear", "factor": 2})
    assert open_model(old).ropes == (RopeConfig(5e5, 16, "linear", 2.0),)


def test_eos_ids_come_from_both_files(tmp_path):
    path = make_tiny_llama(tmp_path, eos=2)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2]}))
    assert open_model(path).eos_token_ids == (2, 7)
    edit(path, eos_token_id=None)
    (path / "generation_config.json").unlink()
    assert open_model(path).eos_token_ids == (2,)  # the tokenizer's


def test_mistral_slides_unless_its_window_is_null(tmp_path):
    path = make_tiny_llama(tmp_path)
    edit(path, architectures=["MistralForCausalLM"], sliding_window=None, attention_bias=True)
    model_config = open_model(path)
    assert (model_config.qkv_bias, model_config.layers) == (False, (LayerConfig(0),) * 2)
    for window, tokens in ((77, 77), ("absent", 4096)):  # in Transformers an absent key means 4096
        edit(path, sliding_window=window)
        assert open_model(path).layers == (LayerConfig(tokens),) * 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architectures": ["BertModel"]}, "BertModel"),
        ({"quantization_config": {"quant_method": "aqlm"}}, "quant_method 'aqlm' is not supported"),
        ({"quantization_config": "awq"}, "quantization_config is not an object"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_scaling": {"rope_type": "spiral", "factor": 4.0}}, "spiral"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor"),
        ({"partial_rotary_factor": 0.5}, "partial"),
        ({"num_key_value_heads": 3}, "evenly"),
        ({"hidden_size": "absent"}, "hidden_size is missing"),
        ({"hidden_size": -64}, "hidden_size is -64"),
        ({"vocab_size": True}, "vocab_size"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"eos_token_id": 384}, "outside"),
        ({"eos_token_id": "2"}, "not a token id"),
        ({"tie_word_embeddings": False}, "lack the tensor lm_head.weight"),
        ({"intermediate_size": 96}, r"shape \[128, 64\]"),
        ({"num_hidden_layers": 3}, "layers.2"),
        ({"num_hidden_layers": 1}, "no place for"),
        ({"attention_bias": True}, "bias"),
    ],
)
def test_unsupported_models_are_refused(tmp_path, changes, reason):
    path = make_tiny_llama(tmp_path)
    edit(path, **changes)
    with pytest.raises(ModelError, match=reason):
        open_model(path)


def test_dummy_needs_only_the_config(tmp_path):
    path = make_tiny_llama(tmp_path, weights=False, tokenizer=False)
    assert read_model_config(path).num_layers == 2
    with pytest.raises(ModelError, match="safetensors"):
        open_model(path)


def test_missing_and_broken_files(tmp_path):
    path = make_tiny_llama(tmp_path / "m", shards=3)
    shard = path / "model-00002-of-00003.safetensors"
    content = shard.read_bytes()
    for size in (0, 5, 100, len(content) - 1):
        shard.write_bytes(content[:size])
        with pytest.raises(ModelError, match=r"truncated"):
            open_model(path)
    shard.write_bytes(b"\x10" + bytes(7) + b"not json at all!")
    with pytest.raises(ModelError, match="not JSON"):
        open_model(path)
    shard.unlink()
    with pytest.raises(ModelError, match=r"lacks the shard model-00002"):
        open_model(path)
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc/passwd"}}')
    with pytest.raises(ModelError, match="outside"):
        open_model(path)
    (path / "model.safetensors.index.json").write_text('{"weight_map"')
    with pytest.raises(ModelError, match="not valid JSON"):
        open_model(path)
    (path / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json"):
        open_model(path)


def test_pickles_and_missing_tokenizers_are_refused(tmp_path):
    path = make_tiny_llama(tmp_path)
    (path / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        open_model(path)
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickles"):
        open_model(path)


def test_weights_in_another_type_are_refused(tmp_path):
    path = make_tiny_llama(tmp_path)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"F32"', b'"I32"'))
    with pytest.raises(ModelError, match="I32"):
        open_model(path)


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_written_checkpoints_can_be_read(tmp_path, dtype):
    from safetensors.torch import load_file

    path = make_tiny_llama(tmp_path, weights=False, tie=False)
    config = json.loads((path / "config.json").read_text())
    weights = random_weights(config, 3)
    model_config = read_model_config(path)
    shapes = expected_tensors(model_config)
    assert shapes == {n: w.shape for n, w in weights.items()}
    checkpoint.write(path, shapes, dtype, weights.__getitem__, shard_bytes=100_000)
    files = set(checkpoint.weight_map(path).values())
    assert len(files) > 2
    open_model(path)
    read = {n: t.float().numpy() for f in files for n, t in load_file(f).items()}
    assert read.keys() == weights.keys()
    tolerance = 0 if dtype == "F32" else 2**-8
    for name, weight in weights.items():
        np.testing.assert_allclose(read[name], weight, rtol=tolerance, atol=0)


def test_bfloat16_rounds_as_torch_does():
    import torch

    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    values = bits.view(np.float32)
    expected = torch.from_numpy(values.copy()).bfloat16().view(torch.int16).numpy().view(np.uint16)
    ours = checkpoint.to_bfloat16(values)
    numbers = ~np.isnan(values)
    assert (ours[numbers] == expected[numbers]).all()
    assert (ours[~numbers] & 0x7FFF > 0x7F80).all()


def test_tiny_weights_depend_only_on_the_seed(tmp_path):
    config = json.loads((make_tiny_llama(tmp_path, weights=False) / "config.json").read_text())
    first, same, other = (random_weights(config, seed) for seed in (1, 1, 2))
    assert all((first[n] == same[n]).all() and (first[n] != other[n]).any() for n in first)


def test_the_modules_of_serving_processes_do_not_import_torch():
    code = (
        "import sys, daemon.models.model_config, daemon.models.tokenizer, daemon.models.chat_template\n"
        "import daemon.models.store, daemon.models.stop_strings\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'gguf') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
