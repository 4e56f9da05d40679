"""What `llumd check` tells about a model agrees with the model and with the memory of the machine."""

from __future__ import annotations

import json

import pytest

from daemon.cli import model_report
from daemon.cli.memory_budget import Hardware, engine_bytes, kv_pool_bytes, kv_token_bytes
from daemon.cli.prepare import Prepared
from daemon.config import Config
from daemon.models.loader import open_model
from tests.models.quantised.quantise import quantise
from tests.models.tiny_families import FAMILIES, make_tiny
from tests.models.tiny_model import make_tiny_llama

FREE = 8 << 30


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_llama(tmp_path_factory.mktemp("m") / "Tiny", max_position=100_000)


def report_of(path, free=FREE, **settings):
    config = Config(devices=["cpu", "cpu"], **settings)
    model = open_model(path)
    pool = kv_pool_bytes(config, model, 2, free)
    return model_report.describe(Prepared(config, model, path, pool, None), free)


def test_facts_of_a_model(tiny):
    report = report_of(tiny)
    assert (report.name, report.family, report.architecture) == ("Tiny", "llama", "LlamaForCausalLM")
    assert report.parameters == report.active_parameters == open_model(tiny).num_params
    assert report.memory.kv_per_token == 2 * 2 * 2 * 16 * 4  # two layers, K and V, two heads of 16, fp32
    assert report.memory.kv_longest == 100_000 * report.memory.kv_per_token
    assert report.end_tokens == {2: "<|im_end|>"}
    assert (report.chat_templates, report.tool_format, report.quantisation) == (["default"], "", "")
    assert report.weights_on_disk == (tiny / "model.safetensors").stat().st_size
    assert json.loads(model_report.to_json(report))["end_tokens"] == {"2": "<|im_end|>"}


def test_the_longest_context_is_that_of_the_pool(tiny):
    token = report_of(tiny).memory.kv_per_token
    report = report_of(tiny, kv_memory=10_000 * token + 1)
    assert (report.context.model, report.context.served, report.context.fits) == (100_000, 10_000, 100_000)
    assert "10000 of the model's 100000 tokens with these settings; up to 100000 fit" in "\n".join(
        model_report.lines(report)
    )
    assert report_of(tiny).context.served == 100_000


def test_the_memory_of_the_machine_bounds_the_context(tiny):
    needed = report_of(tiny).memory
    free = 2 * (engine_bytes(Config(), open_model(tiny)) + 20_000 * needed.kv_per_token)
    report = report_of(tiny, free, kv_memory=1000 * needed.kv_per_token)
    assert report.context.served == 992  # whole blocks of 16
    assert 19_900 < report.context.fits <= 20_000


def quantised_report(path, **settings):
    config, model = Config(devices=["cpu"], **settings), open_model(path)
    return model_report.describe(Prepared(config, model, path, 1 << 20, None), FREE)


def test_a_quantised_checkpoint_has_its_sizes_on_the_disk_and_in_memory(tmp_path):
    plain = make_tiny(tmp_path / "plain", FAMILIES["qwen2"])
    path = quantise(plain, tmp_path / "quantised", "gptq")
    (path / "consolidated.safetensors").write_bytes(bytes(1 << 20))  # no file of the model
    report, unquantised = quantised_report(path), quantised_report(plain)
    assert (report.quantisation, report.dequantised, unquantised.dequantised) == ("gptq", True, False)
    assert report.weights_on_disk == (path / "model.safetensors").stat().st_size < unquantised.weights_on_disk
    assert (report.memory, report.context) == (unquantised.memory, unquantised.context)
    model = open_model(path)
    table = model.vocab_size * model.hidden_size
    assert report.memory.dtype == "fp32"
    assert report.memory.weights == 4 * (model.num_params - table) + 2 * table  # the embeddings stay as stored
    text = "\n".join(model_report.lines(report))
    assert "gptq, dequantised to fp32 when loaded" in text
    assert quantised_report(path, dtype="bf16").memory.weights < 0.7 * report.memory.weights


def test_a_quantised_checkpoint_has_the_context_of_its_size_in_memory(tmp_path):
    """Files of 4 bits leave more room than the engine has, which dequantises them."""
    plain = make_tiny(tmp_path / "plain", FAMILIES["qwen2"], max_position_embeddings=1 << 20)
    path = quantise(plain, tmp_path / "quantised", "gptq")
    config, model = Config(devices=["cpu"]), open_model(path)
    free = engine_bytes(config, model) + 3000 * kv_token_bytes(config, model)
    report = model_report.describe(Prepared(config, model, path, 1 << 20, None), free)
    assert 2900 < report.context.fits <= 3000


def test_engines_that_compute_in_bf16_need_half_the_memory(tiny):
    model, free = open_model(tiny), 1 << 40
    fp32, bf16 = (
        model_report.describe(Prepared(Config(devices=["cpu"]), model, tiny, 1 << 30, None, hardware), free)
        for hardware in (Hardware(), Hardware(bf16=True))
    )
    assert (fp32.memory.dtype, bf16.memory.dtype) == ("fp32", "bf16")
    assert bf16.memory.kv_per_token == fp32.memory.kv_per_token / 2
    assert bf16.memory.weights < fp32.memory.weights
