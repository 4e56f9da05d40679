"""Conversion of GGUF files: config, tokenizer and, within the quantisation, weights equal those of the source."""

import json
import math
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
import tokenizers

from daemon.models import checkpoint
from daemon.models.architecture import RopeConfig
from daemon.models.chat_template import ChatTemplate
from daemon.models.gguf.config import config_of
from daemon.models.gguf.convert import convert
from daemon.models.gguf.file import check, open_gguf
from daemon.models.gguf.tokenizer import _SPLITS, write_tokenizer
from daemon.models.loader import open_model
from daemon.models.model_config import ModelError
from daemon.models.tokenizer import Tokenizer
from tests.models.gguf.tiny_gguf import make_tiny_gguf
from tests.models.tiny_model import CHAT_TEMPLATE

pytestmark = pytest.mark.integration


def converted(file, directory):
    directory.mkdir()
    convert(open_gguf(file), directory)
    return open_model(directory)


def weights_of(path):
    from safetensors.torch import load_file

    return {n: t.float().numpy() for f in set(checkpoint.weight_map(path).values()) for n, t in load_file(f).items()}


def bfloat16(values):
    return (checkpoint.to_bfloat16(values).astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize(
    ("kind", "rounded"),
    [("F32", False), ("F16", True), ("BF16", True), ("Q8_0", True), ("Q4_1", True), ("Q5_0", True)],
)
@pytest.mark.parametrize("tie", [True, False])
def test_weights_and_config_are_converted(tmp_path, kind, rounded, tie):
    expected = make_tiny_gguf(tmp_path / "m.gguf", kind, tie=tie, rope_theta=7e4, layers=1, max_position=77)
    model_config = converted(tmp_path / "m.gguf", tmp_path / "out")
    assert (model_config.num_layers, model_config.hidden_size) == (1, 64)
    assert (model_config.num_heads, model_config.num_kv_heads) == (4, 2)
    assert (model_config.ropes[0].theta, model_config.rms_norm_eps, model_config.max_position) == (7e4, 1e-5, 77)
    assert (model_config.tie_embeddings, model_config.eos_token_ids, model_config.vocab_size) == (tie, (2,), 384)
    weights = weights_of(model_config.path)
    assert weights.keys() == expected.keys()
    for name, values in expected.items():
        assert (weights[name] == (bfloat16(values) if rounded else values)).all(), name
    assert open_gguf(tmp_path / "m.gguf").converted_bytes == model_config.num_params * (2 if rounded else 4)


def test_the_conversion_equals_transformers(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    make_tiny_gguf(tmp_path / "m.gguf", "Q4_1", rope_theta=7e4)
    path = converted(tmp_path / "m.gguf", tmp_path / "out").path
    ours = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    state = reference.state_dict()
    for name, weight in ours.state_dict().items():
        assert (weight == state[name].bfloat16().float()).all(), name
    assert ours.config.rms_norm_eps == pytest.approx(reference.config.rms_norm_eps, rel=1e-6)
    for key in ("rope_parameters", "head_dim", "max_position_embeddings", "eos_token_id"):
        assert getattr(ours.config, key) == getattr(reference.config, key), key


def test_biases_are_reordered(tmp_path):
    expected = make_tiny_gguf(tmp_path / "m.gguf", attention_bias=True, mlp_bias=True)
    model_config = converted(tmp_path / "m.gguf", tmp_path / "out")
    assert model_config.qkv_bias
    assert model_config.out_bias
    assert model_config.mlp_bias
    weights = weights_of(model_config.path)
    name = "model.layers.1.self_attn.k_proj.bias"
    assert (weights[name] == bfloat16(expected[name])).all()


def test_tokenizer_and_chat_template_are_converted(tmp_path):
    make_tiny_gguf(tmp_path / "m.gguf")
    converted(tmp_path / "m.gguf", tmp_path / "out")
    ours = Tokenizer(tmp_path / "out")
    source = tokenizers.Tokenizer.from_file(str(tmp_path / "source" / "tokenizer.json"))
    for text in ("the quick brown fox 1234 \n\n naïve 🙂", "<|im_start|>user\nhi<|im_end|>"):
        assert ours.encode(text, add_special=True) == source.encode(text).ids
    assert ours.special_ids == {0, 1, 2}
    assert ChatTemplate(tmp_path / "out").available
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == CHAT_TEMPLATE


def test_all_end_of_sequence_tokens_are_used(tmp_path):
    make_tiny_gguf(tmp_path / "m.gguf", metadata={"tokenizer.ggml.eot_token_id": 9, "tokenizer.ggml.eos_token_id": 2})
    assert converted(tmp_path / "m.gguf", tmp_path / "out").eos_token_ids == (2, 9)


@pytest.mark.parametrize("kind", [3, 1])  # a control token, or a word by mistake
def test_the_end_of_a_turn_is_an_end_although_the_metadata_names_another(tmp_path, kind):
    types = [3, 3, kind, *[1] * 381]
    make_tiny_gguf(
        tmp_path / "m.gguf", metadata={"tokenizer.ggml.eos_token_id": 5, "tokenizer.ggml.token_type": types}
    )
    assert converted(tmp_path / "m.gguf", tmp_path / "out").eos_token_ids == (5, 2)
    ours = Tokenizer(tmp_path / "out")
    assert ours.encode("a<|im_end|>", add_special=False)[-1] == 2
    assert 2 in ours.special_ids


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recognised_from_the_frequency_factors(tmp_path, factor):
    """The factors follow the definition in Transformers: wavelengths compared with 8192 / low and 8192 / high."""
    theta, dim = 500000.0, 64
    divisors = []
    for i in range(0, dim, 2):
        wavelength = 2 * math.pi * theta ** (i / dim)
        smooth = (8192 / wavelength - 1) / 3
        divisors.append(
            1.0 if wavelength < 2048 else factor if wavelength > 8192 else 1 / ((1 - smooth) / factor + smooth)
        )
    rope = np.array(divisors, dtype=np.float32)
    make_tiny_gguf(
        tmp_path / "m.gguf",
        head_dim=dim,
        rope_theta=theta,
        extra={"rope_freqs.weight": rope},
        metadata={"llama.attention.key_length": dim, "llama.attention.value_length": dim},
    )
    assert converted(tmp_path / "m.gguf", tmp_path / "out").ropes == (
        RopeConfig(theta, dim, "llama3", factor, 8192, low_freq_factor=1.0, high_freq_factor=4.0),
    )
    rope[5] = 3
    make_tiny_gguf(
        tmp_path / "m.gguf",
        head_dim=dim,
        rope_theta=theta,
        extra={"rope_freqs.weight": rope},
        metadata={"llama.attention.key_length": dim, "llama.attention.value_length": dim},
    )
    with pytest.raises(ModelError, match="frequency factors"):
        convert(open_gguf(tmp_path / "m.gguf"), tmp_path)


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"general.architecture": "mamba"}, "mamba"),
        ({"llama.expert_count": 8}, "expert_used_count"),
        ({"split.count": 2}, "several parts"),
        ({"llama.rope.dimension_count": 8}, "partly rotated"),
        ({"llama.rope.scaling.type": "yarn"}, "rope.scaling.factor"),
        ({"llama.rope.scaling.type": "spiral"}, "spiral"),
        ({"llama.attention.head_count": None}, "attention.head_count"),
        ({"llama.attention.head_count": [4, 2]}, "layer to layer"),
        ({"tokenizer.ggml.pre": None}, "default"),
        ({"tokenizer.ggml.pre": "strange"}, "strange"),
        ({"tokenizer.ggml.model": "bert"}, "bert"),
        ({"tokenizer.ggml.merges": ["zz zz"]}, "merges"),
        ({"llama.block_count": 3}, r"lacks blk\.2"),
    ],
)
def test_unsupported_files_are_refused(tmp_path, metadata, reason):
    make_tiny_gguf(tmp_path / "m.gguf", metadata=metadata)
    with pytest.raises(ModelError, match=reason):
        converted(tmp_path / "m.gguf", tmp_path / "out")


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece"])
def opened(request, tmp_path_factory):
    file = tmp_path_factory.mktemp("gguf") / "m.gguf"
    make_tiny_gguf(file, layers=1)
    source = open_gguf(file)
    if request.param == "sentencepiece":
        scores = [0.0] * len(source.metadata["tokenizer.ggml.tokens"])
        source.metadata.update({"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": scores})
    return source


WRONG = ["x", "", -1, 0, 2**40, 1.5, True, [], ["x"], [1, 2], None, math.nan]


def test_any_value_in_the_metadata_is_used_or_refused_with_a_message(opened, tmp_path):
    for key, (i, value) in product(opened.metadata, enumerate(WRONG)):
        source = replace(opened, metadata=opened.metadata | {key: value})
        try:
            directory = tmp_path / f"{key}-{i}"
            directory.mkdir()
            check(source)
            config_of(source)
            write_tokenizer(source.metadata, directory)
        except ModelError as e:
            assert "invalid literal" not in str(e) and "could not convert" not in str(e)


def test_unknown_tensors_and_truncated_files_are_refused(tmp_path):
    file = tmp_path / "m.gguf"
    make_tiny_gguf(file, extra={"blk.0.attn_sinks.weight": np.ones(4, dtype=np.float32)})
    with pytest.raises(ModelError, match="attn_sinks"):
        converted(file, tmp_path / "out")
    content = file.read_bytes()
    for size in (8, 5000, len(content) // 2, len(content) - 4096):
        file.write_bytes(content[:size])
        with pytest.raises(ModelError, match="not a complete GGUF"):
            open_gguf(file)


@pytest.mark.parametrize("name", sorted(_SPLITS))
def test_pre_tokenizers_keep_all_text(name):
    parts = _SPLITS[name]().pre_tokenize_str("I'd pay 12345 €, naïve 你好\r\n\n  x\t🙂 DON'T")
    spans = [span for _, span in parts]
    assert spans[0][0] == 0
    assert all(a[1] == b[0] for a, b in pairwise(spans))
    digits = [p for p, _ in parts if p.strip("Ġ").isdigit()]
    expected = {"llama-bpe": ["123", "45"], "gpt-2": ["Ġ12345"], "smollm": list("12345"), "qwen2": list("12345")}
    assert digits == expected.get(name, digits)


def test_bos_is_added_if_the_metadata_says_so(tmp_path):
    file = tmp_path / "m.gguf"
    make_tiny_gguf(file, metadata={"tokenizer.ggml.add_bos_token": True})
    write_tokenizer(open_gguf(file).metadata, tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["bos_token"] == "<|endoftext|>"
    ours = Tokenizer(tmp_path)
    assert ours.encode("a", add_special=True) == [0, *ours.encode("a", add_special=False)]
