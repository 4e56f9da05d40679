"""The host's part of the CUDA engine's steps, over a CUDA runtime that does nothing at all.

    python -m tools.simgpu --launch-only -m bench.gpu_host [--json FILE]

Everything between a step's plan and its result runs as on a GPU: arrays, FlashInfer's schedules, launches or a
graph's replay, tokens read back. Kernels take no time and calls of the runtime next to none, so what is timed is
Python, PyTorch and FlashInfer on this machine's processor. With overlap it is hidden while it is shorter than the
device's step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import gpu_steps, machine
from bench.gpu_model import LLAMA_8B, model_config_of
from daemon.engine.runner import Row, StepPlan

# As many layers, heads and calls as an 8B has; widths, which only the device feels, are small.
SHAPE: dict[str, Any] = LLAMA_8B | {"hidden_size": 1024, "intermediate_size": 1024, "vocab_size": 32000}
MADE = gpu_steps.Made("cuda:0", 256, 2048, 2304, kv_blocks=1200)
DECODES = ((1, 1024), (8, 1024), (64, 256), (256, 60))  # sequences, tokens of each
CHUNKS = (20, 200, 2000)  # tokens of a prompt
ROUNDS = 200


def measure() -> dict[str, Any]:
    """Median microseconds of launch and of collect, by step."""
    with tempfile.TemporaryDirectory() as folder:
        runner = gpu_steps.make(model_config_of(SHAPE, Path(folder)), MADE)
    found: dict[str, Any] = {}
    for batch, length in DECODES:
        requests = gpu_steps._standing(batch, length, 1, MADE.block_size)
        plan = StepPlan([Row(request, length - 1, 1, True) for request in requests], batch)
        found[f"decode, batch {batch}"] = _timed(runner, plan, ROUNDS)
    for tokens in CHUNKS:
        [request] = gpu_steps._standing(1, tokens, 1, MADE.block_size)
        found[f"chunk of {tokens}"] = _timed(runner, StepPlan([Row(request, 0, tokens, True)], 0), ROUNDS // 4)
    return found


def _timed(runner: Any, plan: StepPlan, rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {"launch_us": [], "collect_us": []}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = work()
        times[name].append((time.perf_counter() - began) * 1e6)
        return result

    for _ in range(rounds + 5):
        ticket = timed("launch_us", lambda: runner.launch(plan))
        timed("collect_us", lambda ticket=ticket: runner.collect(ticket))
    return {name: statistics.median(values[5:]) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    import torch

    command = "python -m tools.simgpu --launch-only -m bench.gpu_host"
    facts = {"command": command, "machine": machine.describe(), "torch": torch.__version__}
    found = measure()
    print(f"{'step':<20}{'launch us':>12}{'collect us':>12}")
    for name, row in found.items():
        print(f"{name:<20}{row['launch_us']:>12.0f}{row['collect_us']:>12.0f}")
    if args.json:
        args.json.write_text(json.dumps(facts | {"steps": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
