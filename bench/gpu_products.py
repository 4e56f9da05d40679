"""The products of decode steps: by torch, which calls cuBLAS, and by the algorithms that the engine chose at load."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from bench.gpu_steps import RunnerOptions, make_runner
from daemon.engine.cuda.graphs import DecodeGraphs, Step
from daemon.engine.cuda.product_choice import LIMITS
from daemon.engine.cuda.products import ChosenProducts
from daemon.engine.cuda.runner import CudaRunner
from daemon.engine.cuda.staging import CudaStream
from daemon.models.model_config import ModelConfig

_ALL = LIMITS._replace(min_bytes=0, read_bytes=0)  # for a dry run: its model is too small for a choice to matter
_BLOCKS = 1024


class Found(NamedTuple):
    """A measurement. `more`: figures that belong to it."""

    what: str
    value: float
    unit: str
    more: dict[str, Any]


@torch.inference_mode()
def measure(config: ModelConfig, options: RunnerOptions, batches: Sequence[int], *, dry: bool) -> Iterator[Found]:
    """Report what the choice took, steps of those of `batches` that have one, and the products of each bucket."""
    limits = _ALL if dry else LIMITS
    os.environ.pop("LLUMD_PRODUCTS", None)  # which turns the choice off
    runner = make_runner(config, options._replace(kv_blocks=_BLOCKS, product_limits=limits))
    made = runner.products.chosen
    yield Found("measured at load in", made.seconds, "s", {"of": len(made.choices), "changed": len(made.by_shape)})
    buckets = sorted({choice.rows for choice in made.choices})
    for rows in (rows for rows in batches if rows in buckets):
        by_torch, by_choice = step_seconds(runner, rows)
        yield Found(f"step of {rows}, context 1", by_choice * 1e3, "ms", {"torch_ms": by_torch * 1e3})
    for rows in buckets:
        each = [choice for choice in made.choices if choice.rows == rows]
        by_torch = sum(c.times * c.by_torch for c in each) * 1e3
        by_choice = sum(c.times * c.by_choice for c in each) * 1e3
        gains = {"/".join(c.names): 1 - c.by_choice / c.by_torch for c in each if c.by_choice < c.by_torch}
        yield Found(f"products of a step of {rows}", by_choice, "ms", {"torch_ms": by_torch} | gains)


def step_seconds(runner: CudaRunner, rows: int) -> tuple[float, float]:
    """Return the seconds of a step of `rows` decodes with a context of one token: by torch, and by choice.

    Raises RuntimeError if their logits differ.
    """
    stream = runner._stream
    assert isinstance(stream, CudaStream)

    def by_torch() -> None:
        chosen, runner.products.chosen = runner.products.chosen, ChosenProducts({})
        try:
            runner._forward.decode(rows)
        finally:
            runner.products.chosen = chosen

    paths: dict[str, Step] = {"torch": by_torch, "choice": partial(runner._forward.decode, rows)}
    graphs = DecodeGraphs(stream)
    with torch.cuda.stream(stream.stream):
        runner._prepare(rows)
    graphs.capture(rows, paths, runner._forward.logits[:rows])
    found = graphs.seconds[rows]
    if "choice" not in found:
        raise RuntimeError(f"the chosen products give other logits for {rows} rows")
    return found["torch"], found["choice"]
