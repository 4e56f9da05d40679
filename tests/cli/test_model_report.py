"""What `llumd check` tells about a model agrees with the model and with the memory of the machine."""

from __future__ import annotations

import json

import pytest

from daemon.cli import model_report
from daemon.cli.memory_budget import engine_bytes, kv_pool_bytes
from daemon.cli.prepare import Prepared
from daemon.config import Config
from daemon.models.loader import open_model
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


def test_a_quantised_checkpoint_is_named(tiny, tmp_path):
    path = make_tiny_llama(tmp_path / "q")
    config = json.loads((path / "config.json").read_text())
    prepared = Prepared(Config(devices=["cpu"]), open_model(path), path, 1 << 20, None)
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    assert model_report.describe(prepared, FREE).quantisation == "awq"
