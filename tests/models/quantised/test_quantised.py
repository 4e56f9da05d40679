"""Quantised checkpoints mean the matrices that their formats define, and what cannot be read names its key."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from daemon.engine.weights import open_weights
from daemon.models.loader import open_model
from daemon.models.model_config import ModelError
from daemon.models.tensors import expected_tensors
from tests.engine.cpu.harness import LogitsRecorder, generate, make_runner, request
from tests.models.quantised.quantise import BLOCK, METHODS, quantise
from tests.models.tiny_families import FAMILIES, edit_config, make_tiny

pytestmark = pytest.mark.integration
SMALL = {"num_hidden_layers": 1}


def made(path: Path, method: str, family: str = "qwen2", **changes: Any) -> tuple[Path, Path]:
    """Return a quantised model, and the same model with plain weights."""
    plain = make_tiny(path / "plain", FAMILIES[family], **(SMALL | changes))
    return quantise(plain, path / "quantised", method), plain


def edit_quantisation(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    edit_config(path, quantization_config={k: v for k, v in (config | changes).items() if v != "absent"})


def assert_same_weights(quantised: Path, plain: Path) -> None:
    config = open_model(quantised)
    ours, expected = open_weights(config, "auto"), open_weights(open_model(plain), "auto")
    for name in expected_tensors(config):
        assert torch.equal(ours.get(name).float(), expected.get(name).float()), name


@pytest.mark.parametrize("method", METHODS)
def test_matrices_are_what_the_format_defines(tmp_path: Path, method: str) -> None:
    assert_same_weights(*made(tmp_path, method))


@pytest.mark.parametrize("family", ["phi3", "qwen3_moe", "mixtral", "gemma2"])
@pytest.mark.parametrize("method", ["fp8, blocks", "compressed, int4 groups", "gptq", "awq"])
def test_fused_matrices_and_those_of_experts_too(tmp_path: Path, family: str, method: str) -> None:
    assert_same_weights(*made(tmp_path, method, family))


@pytest.mark.parametrize("method", ["fp8, blocks", "gptq, in any order"])
def test_the_logits_are_those_of_the_dequantised_model(tmp_path: Path, method: str) -> None:
    logits = []
    for path in made(tmp_path, method, num_hidden_layers=2):
        runner = make_runner(path, deterministic=True)  # only such an engine promises equal bits
        recorder = LogitsRecorder(runner)
        r = request(list(range(3, 40)), count(), 64)
        generate(runner, [r], 8)
        logits.append(torch.stack(recorder.of(r)))
    assert torch.equal(*logits)


def test_groups_of_modules_are_quantised_in_their_own_ways(tmp_path: Path) -> None:
    """The targets of a group may be names and patterns; they win over the class."""
    quantised, plain = made(tmp_path, "compressed, int4 groups")
    other, _ = made(tmp_path / "other", "compressed, float8 rows")
    mixed, meant = load_file(quantised / "model.safetensors"), load_file(plain / "model.safetensors")
    for name in [n for n in mixed if ".down_proj." in n]:
        del mixed[name]
    for files, source in ((mixed, other), (meant, tmp_path / "other" / "plain")):
        files.update({n: t for n, t in load_file(source / "model.safetensors").items() if ".down_proj." in n})
    save_file(mixed, quantised / "model.safetensors")
    save_file(meant, plain / "model.safetensors")
    int4, float8 = (
        json.loads((path / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
        for path in (quantised, other)
    )
    groups = {"a": int4 | {"format": "pack-quantized"}, "b": float8 | {"targets": ["re:.*down_proj$"]}}
    edit_quantisation(quantised, format="mixed-precision", config_groups=groups)
    assert_same_weights(quantised, plain)
    groups["a"]["targets"] = ["model.layers.0.self_attn.q_proj"]
    edit_quantisation(quantised, config_groups=groups)
    with pytest.raises(ModelError, match=r"no config_groups for model\.layers\.0\."):
        open_model(quantised)


def test_scales_of_a_quantised_cache_are_not_needed(tmp_path: Path) -> None:
    quantised, plain = made(tmp_path, "fp8, one scale")
    tensors = load_file(quantised / "model.safetensors")
    tensors |= {f"model.layers.0.self_attn.{x}_scale": torch.ones(1) for x in "kv"}
    save_file(tensors, quantised / "model.safetensors")
    assert_same_weights(quantised, plain)


def test_parts_of_a_matrix_may_be_in_several_files(tmp_path: Path) -> None:
    quantised, plain = made(tmp_path, "fp8, blocks")
    tensors = load_file(quantised / "model.safetensors")
    files = {n: f"model-{i % 2}.safetensors" for i, n in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({n: t for n, t in tensors.items() if files[n] == file}, quantised / file)
    (quantised / "model.safetensors").unlink()
    (quantised / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert_same_weights(quantised, plain)


def test_a_bias_that_the_model_does_not_have_must_be_zero(tmp_path: Path) -> None:
    quantised, _ = made(tmp_path, "gptq")
    tensors = load_file(quantised / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.bias"
    tensors[name][5] = 0.5
    save_file(tensors, quantised / "model.safetensors")
    with pytest.raises(ModelError, match=name):
        open_model(quantised)


def test_random_weights_ignore_the_quantisation(tmp_path: Path) -> None:
    path = make_tiny(tmp_path, FAMILIES["qwen2"])
    edit_config(path, quantization_config={"quant_method": "aqlm"})
    assert open_model(path, load_format="dummy").num_layers == 2


def group(**changes: Any) -> dict[str, Any]:
    weights = {"num_bits": 4, "strategy": "group", "group_size": 16, **changes}
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


@pytest.mark.parametrize(
    ("method", "changes", "reason"),
    [
        ("fp8, blocks", {"quant_method": "nvfp4"}, "quant_method 'nvfp4'"),
        ("fp8, blocks", {"quant_method": "absent"}, "quant_method 'None'"),
        ("fp8, blocks", {"fmt": "e5m2"}, "fmt is 'e5m2'"),
        ("fp8, blocks", {"activation_scheme": "tidal"}, "activation_scheme is 'tidal'"),
        ("fp8, blocks", {"weight_block_size": [BLOCK[0]]}, "weight_block_size"),
        ("fp8, blocks", {"weight_block_size": [8, 8]}, r"weight_scale_inv has shape \[\d+, \d+\]"),
        ("gptq", {"bits": 3}, "quantization_config: bits is 3"),
        ("gptq", {"bits": "absent"}, "bits is missing"),
        ("gptq", {"bits": 8}, "scales has shape"),
        ("gptq", {"group_size": 8}, "scales has shape"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        ("gptq", {"is_marlin_format": True}, "is_marlin_format"),
        ("gptq", {"dynamic": {"+:.*down.*": {"bits": 8}}}, "dynamic"),
        ("awq", {"bits": 8}, "bits is 8"),
        ("awq", {"version": "gemv"}, "version is 'gemv'"),
        ("awq", {"zero_point": False}, "zero_point is False"),
        ("compressed, int4 groups", {"format": "marlin-24"}, "format is 'marlin-24'"),
        ("compressed, int4 groups", {"config_groups": "absent"}, "config_groups"),
        ("compressed, int4 groups", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        ("compressed, int4 groups", {"transform_config": {"config_groups": {"u": 1}}}, "transform_config"),
        ("compressed, int4 groups", group(num_bits=3), r"config_groups\.group_0: .*num_bits 3"),
        ("compressed, int4 groups", group(type="float"), "type 'float' and num_bits 4"),
        ("compressed, int4 groups", group(strategy="tensor_group"), "strategy is 'tensor_group'"),
        ("compressed, int4 groups", group(strategy="block"), "block_structure"),
        ("compressed, int4 groups", group(group_size=32), "weight_scale has shape"),
        ("compressed, int4 groups", group(symmetric=False), "lack the tensor .*weight_zero_point"),
    ],
)
def test_what_cannot_be_dequantised_names_its_key(
    tmp_path: Path, method: str, changes: dict[str, Any], reason: str
) -> None:
    quantised, _ = made(tmp_path, method)
    edit_quantisation(quantised, **changes)
    with pytest.raises(ModelError, match=reason):
        open_model(quantised)


def test_a_checkpoint_without_its_configuration_is_refused(tmp_path: Path) -> None:
    quantised, _ = made(tmp_path, "fp8, blocks")
    edit_config(quantised, quantization_config=None)
    with pytest.raises(ModelError, match=r"F8_E4M3|no place for"):
        open_model(quantised)


def test_a_group_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    quantised, _ = made(tmp_path, "gptq, in any order")
    tensors = load_file(quantised / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.g_idx"
    tensors[name][3] = 99
    save_file(tensors, quantised / "model.safetensors")
    with pytest.raises(ModelError, match=name):
        open_weights(open_model(quantised), "auto").get("model.layers.0.mlp.up_proj.weight")
