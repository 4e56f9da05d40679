"""A model of another family than Llama through the whole daemon, while its requests move between engines."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

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
            "return_tokens_as_token_ids": True,
            "stream": True,
        }
        for _ in range(20)
    ]
    before = daemon.metric(TAKEOVERS)
    with Clients(daemon, bodies) as clients, RandomMover(daemon, 1, engines=2):
        outcomes = clients.join()
    assert daemon.metric(TAKEOVERS) - before > 5
    assert all(len(tokens_of(outcome)) == 120 for outcome in outcomes)
    reference = transformers_model(path)
    for body, outcome in zip(bodies, outcomes, strict=True):
        assert outcome.ok
        output = [int(token.removeprefix("token_id:")) for token in tokens_of(outcome)]
        assert output == greedy(reference, body["prompt"], output)


@torch.inference_mode()
def greedy(reference: Any, prompt: list[int], output: list[int]) -> list[int]:
    """Return the most likely token at each position of `output`, given the tokens before it."""
    logits = reference(torch.tensor([prompt + output[:-1]])).logits[0, len(prompt) - 1 :]
    return list(logits.argmax(-1).tolist())
