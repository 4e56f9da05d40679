"""Quantised checkpoints through the whole daemon: the tokens are those of the dequantised model."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest

from tests.e2e.conftest import Start
from tests.engine.cpu.harness import generate, make_runner, request
from tests.models.quantised.quantise import quantise
from tests.models.tiny_families import FAMILIES, make_tiny

PROMPTS = [[3 + (7 * i + 11 * j) % 370 for j in range(5 + 9 * i)] for i in range(4)]
TOKENS = 24


@pytest.mark.parametrize("method", ["fp8, blocks", "gptq, in any order"])
def test_the_tokens_are_those_of_the_dequantised_model(start: Start, tmp_path: Path, method: str) -> None:
    plain = make_tiny(tmp_path / "plain", FAMILIES["qwen2"])
    quantised = quantise(plain, tmp_path / "quantised", method)
    daemon = start(
        "--devices", "cpu", "--deterministic", "--kv-memory", "16MiB", engine="model", model=str(quantised)
    )
    assert "weights of quantised, " in daemon.log and "are dequantised" in daemon.log
    fields = {"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "logprobs": 0}
    answers = [daemon.complete(p, **fields, return_tokens_as_token_ids=True).json() for p in PROMPTS]
    served = [a["choices"][0]["logprobs"]["tokens"] for a in answers]
    twin, blocks = make_runner(plain, deterministic=True), count(1)
    requests = [request(prompt, blocks, len(prompt) + TOKENS) for prompt in PROMPTS]
    generate(twin, requests, TOKENS)
    assert served == [[f"token_id:{token}" for token in r.tokens[r.prompt_len :]] for r in requests]
