"""Decode steps of a mixture of experts on the CPU, beside dense models with the same weights. Random weights.

Each model has the same attention, embeddings and head. Their MLPs have: the mixture, EXPERTS experts of which each
token uses PER_TOKEN; "dense", as many weights as all experts; "active", as many as the experts of one token. A step
of the mixture should cost as one of "active" for one row, and no more than one of "dense" for many rows.

    python -m bench.experts --out bench/results/experts.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.engine import BLOCK_SIZE, SMOLLM2_135M, new_request
from bench.machine import describe
from daemon.engine.cpu.runner import CpuRunner
from daemon.engine.runner import Row, RunnerSettings, StepPlan
from daemon.models.architecture import ExpertsConfig, LayerConfig, ModelConfig

EXPERTS, PER_TOKEN, WIDTH, LAYERS = 32, 4, 384, 6
ROWS = (1, 8, 32)
Key = tuple[str, int]  # name of a model, rows
_LENGTH = 64  # tokens of context: attention costs little
_DENSE = replace(
    SMOLLM2_135M, hidden_size=1024, num_heads=16, num_kv_heads=4, vocab_size=8192, layers=(LayerConfig(),) * LAYERS
)
MODELS: dict[str, ModelConfig] = {
    "mixture": replace(
        _DENSE,
        layers=(LayerConfig(experts=True),) * LAYERS,
        experts=ExpertsConfig(EXPERTS, PER_TOKEN, WIDTH, normalise=True),
    ),
    "dense": replace(_DENSE, intermediate_size=EXPERTS * WIDTH),
    "active": replace(_DENSE, intermediate_size=PER_TOKEN * WIDTH),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="auto", choices=("auto", "bf16", "fp32"))
    parser.add_argument("--repeat", type=int, default=15, help="timed steps of each kind; the result is the fastest")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    args = parser.parse_args()
    runners = {name: _runner(config, args) for name, config in MODELS.items()}
    steps = {(name, rows): _step(runners[name], MODELS[name], rows) for rows in ROWS for name in MODELS}
    milliseconds = {key: seconds * 1e3 for key, seconds in _in_turns(steps, args.repeat).items()}
    result: dict[str, Any] = {
        "machine": describe(),
        "threads": args.threads,
        "experts": {"count": EXPERTS, "per_token": PER_TOKEN, "width": WIDTH, "layers": LAYERS},
        "models": {
            name: {
                "params": config.num_params,
                "active_params": config.active_params,
                "arithmetic": runners[name].arithmetic,
                "step_ms": {rows: milliseconds[name, rows] for rows in ROWS},
            }
            for name, config in MODELS.items()
        },
        "dense_over_mixture": {rows: milliseconds["dense", rows] / milliseconds["mixture", rows] for rows in ROWS},
    }
    text = json.dumps(result, indent=1)
    if args.out:
        args.out.write_text(text + "\n")
    print(text)


def _runner(config: ModelConfig, args: argparse.Namespace) -> CpuRunner:
    settings = RunnerSettings(
        threads=args.threads,
        dtype=args.dtype,
        load_format="dummy",
        block_size=BLOCK_SIZE,
        max_num_seqs=max(ROWS),
        max_batch_tokens=512,
        max_model_len=1024,
    )
    runner = CpuRunner(config, settings)
    runner.load(memoryview(bytearray(b"\x3c") * runner.pool_spec(1 + max(ROWS) * _LENGTH // BLOCK_SIZE).nbytes))
    return runner


def _step(runner: CpuRunner, config: ModelConfig, batch: int) -> Callable[[], object]:
    each = _LENGTH // BLOCK_SIZE
    rows = []
    for i in range(batch):
        request = new_request(config, _LENGTH, list(range(1 + i * each, 1 + (i + 1) * each)))
        request.tokens[-1] = 7919 * i % config.vocab_size  # rows with equal tokens would choose the same experts
        rows.append(Row(request, _LENGTH - 1, 1, True))
    return lambda: runner.execute(StepPlan(rows, batch))


def _in_turns(steps: Mapping[Key, Callable[[], object]], repeat: int) -> dict[Key, float]:
    """Return the seconds of the fastest run of each step. They run in turns: a busy machine slows all alike."""
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(repeat):
        for key, step in steps.items():
            start = time.perf_counter()
            step()
            best[key] = min(best[key], time.perf_counter() - start)
    return best


if __name__ == "__main__":
    main()
