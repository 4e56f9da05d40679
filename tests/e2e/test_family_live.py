"""A model of another family than Llama through the whole daemon, while its requests move between engines."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from daemon.models.tokenizer import Tokenizer
from tests.e2e.conftest import Start
from tests.e2e.hash_engine import tokens_of
from tests.e2e.load_client import Clients
from tests.e2e.mover import TAKEOVERS, RandomMover
from tests.engine.cpu.harness import transformers_model
from tests.models.tiny_families import FAMILIES, make_tiny


def test_moved_requests_of_a_mixture_with_windows_agree_with_transformers(start: Start, tmp_path: Path) -> None:
    path = make_tiny(tmp_path / "model", FAMILIES["mixtral"])
    flags = ("--devices", "cpu,cpu", "--dtype", "fp32", "--no-rebalance", "--kv-memory", "64MiB")
    daemon = start(*flags, engine="model", model=str(path))
    rng = random.Random(4)
    bodies: list[dict[str, Any]] = [
        {
            "prompt": [rng.randrange(3, 380) for _ in range(rng.randint(1, 90))],
            "max_tokens": 120,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 0,
            "stream": True,
        }
        for _ in range(20)
    ]
    before = daemon.metric(TAKEOVERS)
    with Clients(daemon, bodies) as clients, RandomMover(daemon, 1, engines=2):
        outcomes = clients.join()
    assert daemon.metric(TAKEOVERS) - before > 5
    reference, tokenizer = transformers_model(path), Tokenizer(path)
    for body, outcome in zip(bodies, outcomes, strict=True):
        assert outcome.ok
        expected = greedy(reference, body["prompt"], 120)
        assert tokens_of(outcome) == [tokenizer.token_text(token) for token in expected]


@torch.inference_mode()
def greedy(reference: Any, prompt: list[int], count: int) -> list[int]:
    generated = reference.generate(
        torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return list(generated[0, len(prompt) :].tolist())
