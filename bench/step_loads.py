"""Steps of a given size, and a runner for them, for benchmarks that also run older revisions of the engine."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.gpu_model import model_config_of

BLOCK_SIZE = 16


class Load(NamedTuple):
    """A step: `decodes` sequences of `context` tokens, and a prompt of `chunk` tokens in one chunk."""

    decodes: int
    context: int
    chunk: int

    @property
    def name(self) -> str:
        parts = [f"decode {self.decodes}"] * bool(self.decodes) + [f"chunk {self.chunk}"] * bool(self.chunk)
        return " + ".join(parts)


def make_runner(shape: dict[str, Any], loads: Sequence[Load], *, device: str, blocks: int) -> Any:
    """Return a loaded `CudaRunner` for all of `loads`, with dummy weights and `blocks` KV blocks.

    A simulated device has no speed, so what an engine measures is fixed: the path for few rows that is fastest on an
    H100, and one pass for mixed steps.
    """
    from daemon.engine.cuda.runner import CudaRunner
    from daemon.engine.runner import RunnerSettings

    with tempfile.TemporaryDirectory() as folder:
        config = model_config_of(shape, Path(folder))
    block = 2 * config.num_layers * BLOCK_SIZE * config.num_kv_heads * config.head_dim * (4 if device == "cpu" else 2)
    settings = RunnerSettings(
        load_format="dummy",
        block_size=BLOCK_SIZE,
        max_num_seqs=max(load.decodes + (load.chunk > 0) for load in loads),
        max_batch_tokens=max(load.decodes + load.chunk for load in loads),
        max_model_len=max(max(load.context, load.chunk) for load in loads) + BLOCK_SIZE,
        kv_memory=blocks * block,
    )
    runner = CudaRunner(config, settings, device=device, decode_path="gemv")
    runner.load()
    runner._mixed_steps = "one pass"  # older revisions have no argument for it
    return runner


def plan_of(load: Load, blocks: int) -> Any:
    """Return the step as a `StepPlan`. Its sequences share the `blocks` blocks of the pool where they are too few."""
    from daemon.engine.request import Request
    from daemon.engine.runner import Row, StepPlan
    from daemon.ipc.messages import RequestParams, SamplingParams

    params = RequestParams(SamplingParams(max_tokens=10**6, seed=0, temperature=0.0), 0.0)
    rows: list[Row] = []
    first = 0
    for length in [load.context] * load.decodes + [load.chunk] * bool(load.chunk):
        count = length // BLOCK_SIZE + 1
        table = [1 + (first + i) % (blocks - 1) for i in range(count)]
        first += count
        tokens = [300 + i % 700 for i in range(length)]
        request = Request(len(rows) + 1, 1, 0, params, tokens, length, block_table=table)
        decodes = len(rows) < load.decodes
        rows.append(Row(request, length - 1 if decodes else 0, 1 if decodes else length, True))
    return StepPlan(rows, load.decodes)
