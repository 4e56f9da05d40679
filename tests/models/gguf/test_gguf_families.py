"""A GGUF file of each family becomes the model that it was made from."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch

from daemon.engine.weights import open_weights
from daemon.models.architecture import ModelConfig
from daemon.models.gguf.config import config_of
from daemon.models.gguf.convert import convert
from daemon.models.gguf.file import GGUF, open_gguf
from daemon.models.gguf.tokenizer import write_tokenizer
from daemon.models.loader import open_model
from daemon.models.model_config import ModelError
from daemon.models.tensors import expected_tensors
from tests.engine.cpu.harness import generate, make_runner, request
from tests.models.gguf.family_gguf import write_family
from tests.models.tiny_families import FAMILIES, LONG, ROPES, make_tiny

pytestmark = pytest.mark.integration
NO_WINDOW = {"use_sliding_window": False}
# What a GGUF file does not say, as in the published models of the family.
PUBLISHED: dict[str, dict[str, Any]] = {
    "qwen2": NO_WINDOW,
    "qwen3, biases and windows": NO_WINDOW,
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3": {"query_pre_attn_scalar": 16},
    "qwen3_moe, some layers dense": {"norm_topk_prob": True},
}


def round_trip(tmp_path: Path, kind: tuple[str, dict[str, Any]], **changes: Any) -> tuple[ModelConfig, ModelConfig]:
    """Return the model of `kind`, and what its GGUF file is converted to."""
    path = make_tiny(tmp_path / "source", kind, **changes)
    write_family(path, tmp_path / "m.gguf", kind[0])
    return open_model(path), converted(tmp_path)


def converted(tmp_path: Path) -> ModelConfig:
    (tmp_path / "out").mkdir()
    convert(open_gguf(tmp_path / "m.gguf"), tmp_path / "out")
    return open_model(tmp_path / "out")


def assert_same_model(source: ModelConfig, result: ModelConfig) -> None:
    assert replace(result, path=source.path, name=source.name) == source
    expected, weights = open_weights(source, "auto"), open_weights(result, "auto")
    for name in expected_tensors(source):
        # (w + 1) - 1 is not exact for the norms of Gemma.
        tolerance = 2e-7 if name.endswith("norm.weight") and source.norm_offset else 0.0
        torch.testing.assert_close(weights.get(name), expected.get(name), rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_becomes_the_model_that_it_was_made_from(tmp_path: Path, name: str) -> None:
    assert_same_model(*round_trip(tmp_path, FAMILIES[name], **PUBLISHED.get(name, {})))


@pytest.mark.parametrize("name", ["gemma3", "phi3, part of a head rotated"])
def test_it_answers_with_the_same_tokens(tmp_path: Path, name: str) -> None:
    answers = []
    for config in round_trip(tmp_path, FAMILIES[name], **PUBLISHED.get(name, {})):
        requests = [request(list(range(3, 40 + i)), count(100 * i), 80) for i in range(2)]
        generate(make_runner(config.path), requests, 24)
        answers.append([r.tokens for r in requests])
    assert answers[0] == answers[1]


@pytest.mark.parametrize("name", ["linear", "yarn", "longrope"])
def test_rope_scaling_is_kept(tmp_path: Path, name: str) -> None:
    source, result = round_trip(tmp_path, ROPES[name])
    assert source.ropes[0].kind == name
    assert_same_model(source, result)


def test_experts_one_by_one_as_early_files_have_them(tmp_path: Path) -> None:
    path = make_tiny(tmp_path / "source", FAMILIES["mixtral"])
    write_family(path, tmp_path / "m.gguf", "Mixtral", experts_stacked=False)
    assert_same_model(open_model(path), converted(tmp_path))


def test_dense_layers_of_a_mixture_by_step_and_by_list(tmp_path: Path) -> None:
    """Layers 0 and 2 are dense by the step, layer 3 by the list. The file has neither, but the tensors show it."""
    name = "qwen3_moe, some layers dense"
    keys = {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    source, result = round_trip(tmp_path, FAMILIES[name], **keys, **PUBLISHED[name])
    assert [layer.experts for layer in source.layers] == [False, True, False, False]
    assert_same_model(source, result)


def test_weights_of_a_mixture_are_bfloat16_although_its_routers_are_float32(tmp_path: Path) -> None:
    path = make_tiny(tmp_path / "source", FAMILIES["mixtral"])
    write_family(path, tmp_path / "m.gguf", "Mixtral")
    source = open_gguf(tmp_path / "m.gguf")
    half = {
        n: t._replace(tensor_type=type(t.tensor_type).F16) if len(t.shape) > 1 and "gate_inp" not in n else t
        for n, t in source.tensors.items()
    }
    assert (source.dtype, replace(source, tensors=half).dtype) == ("F32", "BF16")


def opened(tmp_path: Path, name: str, **changes: Any) -> GGUF:
    path = make_tiny(tmp_path / "source", FAMILIES[name], **changes)
    write_family(path, tmp_path / "m.gguf", FAMILIES[name][0])
    return open_gguf(tmp_path / "m.gguf")


@pytest.mark.parametrize(("name", "architecture", "layers"), [("gemma2", "gemma2", 46), ("gemma3", "gemma3", 62)])
def test_the_27b_models_of_gemma_scale_queries_by_their_width(
    tmp_path: Path, name: str, architecture: str, layers: int
) -> None:
    source = opened(tmp_path, name)
    large = replace(source, metadata=source.metadata | {f"{architecture}.block_count": layers})
    hidden = source.count("embedding_length")
    pattern = {f"{architecture}.attention.sliding_window_pattern": 6}
    large = replace(large, metadata=large.metadata | pattern)
    assert config_of(large)["query_pre_attn_scalar"] == hidden // 4
    assert config_of(source)["query_pre_attn_scalar"] == 16


def test_gemma3_slides_in_five_of_six_layers_if_the_file_does_not_say(tmp_path: Path) -> None:
    source = opened(tmp_path, "gemma3")
    metadata = {k: v for k, v in source.metadata.items() if not k.endswith("sliding_window_pattern")}
    types = config_of(replace(source, metadata=metadata | {"gemma3.block_count": 13}))["layer_types"]
    assert [i for i, kind in enumerate(types) if kind == "full_attention"] == [5, 11]


@pytest.mark.parametrize(
    ("name", "metadata", "reason"),
    [
        ("olmo2", {"olmo2.attention.sliding_window": 4096}, "OLMo 3"),
        ("qwen3", {"qwen3.rope.dimension_count": 8}, "partly rotated"),
        ("mixtral", {"llama.expert_count": 3}, "ffn_gate_inp.weight has the shape"),
        ("qwen2", {"qwen2.rope.scaling.type": "longrope"}, "'longrope'"),
    ],
)
def test_what_cannot_be_converted_is_refused(
    tmp_path: Path, name: str, metadata: dict[str, Any], reason: str
) -> None:
    source = opened(tmp_path, name)
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match=reason):
        convert(replace(source, metadata=source.metadata | metadata), tmp_path / "out")


def test_special_tokens_of_phi3_include_the_space_after_them(tmp_path: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", "<|endoftext|>", "<|end|>", "\u2581", "a", "\n"]
    metadata = {
        "general.architecture": "phi3",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * len(tokens),
        "tokenizer.ggml.token_type": [2, 3, 3, 3, 3, 1, 1, 1],
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.add_bos_token": False,
    }
    for architecture, ids in (("phi3", [4, 6, 3, 7, 6]), ("llama", [4, 7, 6, 3, 7, 6])):
        write_tokenizer(metadata | {"general.architecture": architecture}, tmp_path)
        tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        assert tokenizer.encode("<|end|>\na<|endoftext|>\na").ids == ids


def test_the_factors_of_longrope_are_those_of_the_author(tmp_path: Path) -> None:
    _, result = round_trip(tmp_path, ROPES["longrope"])
    assert result.ropes[0].long_factors == tuple(LONG)
    assert result.ropes[0].short_factors == tuple(float(str(np.float32(x))) for x in [1.1] * 8)
