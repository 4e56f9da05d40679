"""Host time of the CUDA engine's steps, with a CUDA runtime that does nothing.

    python -m tools.simgpu --launch-only -m bench.gpu_host [--json FILE]

Everything between a step's plan and its result runs as on a GPU: arrays, FlashInfer's schedules, launches or the
replay of a graph, and the copy of the tokens. Kernels take no time and calls of the runtime almost none, so the
result is the time of Python, PyTorch and FlashInfer on this machine's CPU. With overlap this time is hidden if it is
shorter than the device's step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench import gpu_steps, machine
from bench.gpu_model import LLAMA_8B, model_config_of
from daemon.engine.cuda.runner import CudaRunner
from daemon.engine.runner import Row, StepPlan

# As many layers, heads and calls as an 8B model. The widths only matter to the device and are small.
SHAPE: dict[str, Any] = LLAMA_8B | {"hidden_size": 1024, "intermediate_size": 1024, "vocab_size": 32000}
OPTIONS = gpu_steps.RunnerOptions(
    "cuda:0", max_num_seqs=256, max_batch_tokens=2048, max_model_len=2304, kv_blocks=1200
)
DECODES = ((1, 1024), (8, 1024), (64, 256), (256, 60))  # sequences, tokens of each
CHUNKS = (20, 200, 2000)  # tokens of a prompt
ROUNDS = 200


def measure() -> dict[str, Any]:
    """Return the median microseconds of launch and collect, by step."""
    with tempfile.TemporaryDirectory() as folder:
        runner = gpu_steps.make_runner(model_config_of(SHAPE, Path(folder)), OPTIONS)
    steps: dict[str, Any] = {}
    for batch, length in DECODES:
        requests = gpu_steps.decoding_requests(runner, batch, length, 1, OPTIONS.block_size)
        plan = StepPlan([Row(request, length - 1, 1, True) for request in requests], batch)
        steps[f"decode, batch {batch}"] = _timed(runner, plan, ROUNDS)
    for tokens in CHUNKS:
        [request] = gpu_steps.decoding_requests(runner, 1, tokens, 1, OPTIONS.block_size)
        steps[f"chunk of {tokens}"] = _timed(runner, StepPlan([Row(request, 0, tokens, True)], 0), ROUNDS // 4)
    return steps


def _timed(runner: CudaRunner, plan: StepPlan, rounds: int) -> dict[str, float]:
    """Run the step `rounds` times; return the median microseconds of launch and of collect."""
    times: dict[str, list[float]] = {"launch_us": [], "collect_us": []}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        times[name].append((time.perf_counter() - start) * 1e6)
        return result

    for _ in range(rounds + 5):
        ticket = timed("launch_us", partial(runner.launch, plan))
        timed("collect_us", partial(runner.collect, ticket))
    return {name: statistics.median(values[5:]) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    import torch

    command = "python -m tools.simgpu --launch-only -m bench.gpu_host"
    facts = {"command": command, "machine": machine.describe(), "torch": torch.__version__}
    steps = measure()
    print(f"{'step':<20}{'launch us':>12}{'collect us':>12}")
    for name, row in steps.items():
        print(f"{name:<20}{row['launch_us']:>12.0f}{row['collect_us']:>12.0f}")
    if args.json:
        args.json.write_text(json.dumps(facts | {"steps": steps}, indent=1) + "\n")


if __name__ == "__main__":
    main()
