"""A daemon with two engines, on two GPUs or on one: migrations between their pools by CUDA IPC, and an engine's
death."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from tests.e2e.daemon_process import Daemon, wait_for
from tests.e2e.load_client import Clients, Outcome
from tests.e2e.mover import TAKEOVERS, RandomMover
from tests.gpu.parts import SIMULATED, judge_greedy, small_llama, transformers_bf16

OUTPUT, STREAMS = (120, 6) if SIMULATED else (1200, 24)
LOADING = 180.0  # seconds in which the engines must be ready
DEVICES = [f"cuda:{i % torch.cuda.device_count()}" for i in range(2)]
FLAGS = (
    "--devices",
    ",".join(DEVICES),
    "--kv-memory",
    "64MiB",
    "--max-num-seqs",
    "24",
    "--no-rebalance",
    "--max-batch-tokens",
    "256",
    "--dtype",
    "bf16",
)


class Letters:
    """A model with one letter for each output token, so that a text determines its tokens."""

    def __init__(self, path: Path) -> None:
        self.path = small_llama(path, tie=False, seed=11)
        tokenizer = Tokenizer.from_file(str(self.path / "tokenizer.json"))
        singles = {c: tokenizer.token_to_id(c) for c in map(chr, range(33, 127))}
        self._ids = {c: i for c, i in singles.items() if i is not None}
        assert len(self._ids) > 50
        self._suppress_other_tokens()

    def _suppress_other_tokens(self) -> None:
        """Set the logits of all other tokens to 0. The largest of fifty random logits is above 0."""
        file = self.path / "model.safetensors"
        weights = load_file(file)
        head = weights["lm_head.weight"]
        others = torch.ones(len(head), dtype=torch.bool)
        others[list(self._ids.values())] = False
        head[others] = 0
        save_file(weights, file, metadata={"format": "pt"})

    def ids(self, text: str) -> list[int]:
        return [self._ids[c] for c in text]


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Letters:
    return Letters(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def reference(letters: Letters) -> Any:
    return transformers_bf16(letters.path)


@pytest.fixture(scope="module", params=["auto", "fp8"])
def two(
    request: pytest.FixtureRequest, letters: Letters, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Daemon]:
    home = tmp_path_factory.mktemp("d")
    daemon = Daemon(home, *FLAGS, "--kv-dtype", request.param, model=str(letters.path), engine="model")
    try:
        daemon.await_ready_line(LOADING)
        yield daemon.await_serving(LOADING)
        assert daemon.terminate(60) == 0, daemon.log
        assert "Traceback" not in daemon.log, daemon.log
    finally:
        daemon.clean_up()
        shutil.rmtree(home, ignore_errors=True)


def bodies(count: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    always = {"max_tokens": OUTPUT, "temperature": 0, "ignore_eos": True, "stream": True}
    return [{"prompt": [rng.randrange(3, 250) for _ in range(rng.randint(20, 400))], **always} for _ in range(count)]


def check(
    letters: Letters, reference: Any, asked: Sequence[dict[str, Any]], outcomes: Sequence[Outcome], close: float
) -> str:
    """Assert that every token is the reference's, except near ties. Return the result as a line of text."""
    answers = [
        ([*body["prompt"], *letters.ids(o.text)], len(body["prompt"]))
        for body, o in zip(asked, outcomes, strict=True)
        if o.text
    ]
    found = judge_greedy(reference, answers)
    assert found.worst <= close
    return f"{found.different} of {found.positions} tokens differ, the reference leads by {found.worst:.1e} at most"


def closeness(daemon: Daemon) -> float:
    return 3e-2 if "auto" in daemon.process.args else 0.2


def test_streams_are_exact_over_moves(two: Daemon, letters: Letters, reference: Any, report_figure: Any) -> None:
    asked, before = bodies(STREAMS, 1), two.metric(TAKEOVERS)
    with Clients(two, asked) as clients, RandomMover(two, 1, engines=2):
        outcomes = clients.join(120)
    assert all(o.ok and len(o.text) == OUTPUT for o in outcomes)
    moves = two.metric(TAKEOVERS) - before
    report_figure(f"{moves:.0f} moves: {check(letters, reference, asked, outcomes, closeness(two))}")
    assert moves > 10
    two.await_idle()


def test_streams_are_exact_when_an_engine_dies_during_moves(two: Daemon, letters: Letters, reference: Any) -> None:
    asked, before = bodies(STREAMS, 2), two.metric(TAKEOVERS)
    with Clients(two, asked) as clients, RandomMover(two, 2, engines=2):
        clients.await_tokens(OUTPUT // 60)
        wait_for("moves", lambda: two.metric(TAKEOVERS) > before)
        killed = two.kill("engine", 1)
        outcomes = clients.join(120)
    assert all(o.ok and len(o.text) == OUTPUT for o in outcomes)
    check(letters, reference, asked, outcomes, closeness(two))
    wait_for("a new engine 1", lambda: successor(two, killed), LOADING)
    two.await_serving(LOADING)
    test_streams_are_exact_over_moves(two, letters, reference, print)


def successor(daemon: Daemon, killed: dict[str, Any]) -> bool:
    row = daemon.child("engine", 1)
    return bool(row["incarnation"] > killed["incarnation"] and row["state"] == "serving")
