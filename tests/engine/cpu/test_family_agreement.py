"""Each family and each rope scaling computes the same as Transformers in fp32."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from daemon.engine.cpu.runner import CpuRunner
from daemon.engine.request import Request
from tests.engine.cpu.harness import (
    LogitsRecorder,
    generate,
    make_runner,
    random_tokens,
    reference_logits,
    request,
    serve,
    transformers_model,
)
from tests.models.tiny_families import FAMILIES, ROPES, make_tiny

pytestmark = pytest.mark.integration


class Subject(NamedTuple):
    """A model directory, and the model in Transformers."""

    path: Path
    reference: Any


@pytest.fixture(scope="module", params=FAMILIES, ids=str)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    path = make_tiny(tmp_path_factory.mktemp("model"), FAMILIES[request.param])
    return Subject(path, transformers_model(path))


def assert_agrees(reference: Any, recorder: LogitsRecorder, requests: list[Request]) -> None:
    """Check that Transformers selects each output token too, and that the log-probabilities are within 1e-4."""
    for r in requests:
        expected = reference_logits(reference, r)
        assert expected.argmax(-1).tolist() == r.tokens[r.prompt_len :]
        got = torch.stack(recorder.of(r))
        assert (got.log_softmax(-1) - expected.log_softmax(-1)).abs().max() < 1e-4


def test_scheduled_requests_agree_with_transformers(subject: Subject) -> None:
    """Requests are batched, chunked, preempted and resumed, and share the blocks of common prefixes."""
    blocks, budget = 30, 96
    runner = make_runner(subject.path, blocks=blocks, max_batch_tokens=budget)
    recorder = LogitsRecorder(runner)
    requests = serve(runner, random.Random(3), requests=24, longest=100, blocks=blocks, budget=budget, output=24)
    assert_agrees(subject.reference, recorder, requests)


def test_requests_move_to_another_engine(subject: Subject) -> None:
    source, destination = (make_runner(subject.path) for _ in range(2))
    recorders = [LogitsRecorder(runner) for runner in (source, destination)]
    rng, blocks, elsewhere = random.Random(5), count(1), count(150)
    requests = [request(random_tokens(rng, n), blocks, 120) for n in (3, 30, 90)]
    generate(source, requests, output=6, chunk=40)
    for r in requests:
        move(r, source, destination, elsewhere)
    generate(destination, requests, output=12)
    recorders[0].logits |= recorders[1].logits
    assert_agrees(subject.reference, recorders[0], requests)


def move(r: Request, source: CpuRunner, destination: CpuRunner, blocks: Iterator[int]) -> None:
    """Copy the request's blocks to others in the pool of `destination`."""
    pools = [runner._model._pool.reshape(-1, runner._shape.block_width) for runner in (source, destination)]
    table = [next(blocks) for _ in r.block_table]
    pools[1][table] = pools[0][r.block_table]
    r.block_table[:] = table


@pytest.mark.parametrize(
    ("kind", "threads"), [("qwen3_moe", 1), ("mixtral", 2), ("gemma2", 1), ("gemma3", 2), ("olmo2", 1)]
)
def test_the_bits_of_a_deterministic_engine_do_not_depend_on_the_batch(
    tmp_path: Path, kind: str, threads: int
) -> None:
    runner = make_runner(make_tiny(tmp_path, FAMILIES[kind]), deterministic=True, threads=threads)
    recorder = LogitsRecorder(runner)
    rng = random.Random(7)
    prompt = random_tokens(rng, 75)
    alone = request(prompt, count(1), 128)
    generate(runner, [alone], 12)
    blocks = count(1)
    others = [request(random_tokens(rng, rng.randint(1, 90)), blocks, 128) for _ in range(9)]
    again = request(prompt, blocks, 128)
    generate(runner, [*others[:4], again, *others[4:]], 12, chunk=17)
    assert torch.equal(torch.stack(recorder.of(alone)), torch.stack(recorder.of(again)))


@pytest.mark.parametrize("kind", ROPES)
def test_every_rope_scaling_agrees_beyond_its_original_length(tmp_path: Path, kind: str) -> None:
    """Angles of dynamic and longrope are those of the longest sequence: the reference computes one first."""
    longest, original = 256, 64
    changes = {"max_position_embeddings": original} if kind in ("linear", "dynamic", "yarn") else {}
    path = make_tiny(tmp_path, ROPES[kind], **changes)
    runner = make_runner(path, max_model_len=longest)
    assert runner.max_model_len == longest
    recorder = LogitsRecorder(runner)
    rng, blocks = random.Random(1), count(1)
    requests = [request(random_tokens(rng, n), blocks, 256) for n in (3 * original, longest - 8)]
    generate(runner, requests, output=8, chunk=50)
    reference = transformers_model(path)
    with torch.inference_mode():
        reference(torch.tensor([random_tokens(rng, longest)]))
    assert_agrees(reference, recorder, requests)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_short_engines_compute_what_was_trained(tmp_path: Path, kind: str) -> None:
    """Up to the original length these scalings change nothing, or have factors of their own."""
    changes = {"max_position_embeddings": 64} if kind == "dynamic" else {}
    path = make_tiny(tmp_path, ROPES[kind], **changes)
    runner = make_runner(path, max_model_len=64)
    recorder = LogitsRecorder(runner)
    r = request(random_tokens(random.Random(1), 40), count(1), 64)
    generate(runner, [r], output=8)
    assert_agrees(transformers_model(path), recorder, [r])
