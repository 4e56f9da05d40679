"""Step times of the CPU engine: decode batches, prefill chunks, and their share of the memory bandwidth.

    python -m bench.engine --threads 1 --out bench/results/engine.json

Without --model it uses the shape of SmolLM2-135M with dummy weights and needs no files.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from daemon.engine.cpu.memory import weights_bytes
from daemon.engine.cpu.runner import CpuRunner
from daemon.engine.request import Request
from daemon.engine.runner import Row, RunnerSettings, StepPlan
from daemon.ipc.messages import RequestParams, SamplingParams
from daemon.models.architecture import LayerConfig, ModelConfig, RopeConfig
from daemon.models.loader import open_model

SMOLLM2_135M = ModelConfig(
    path=Path("."),
    name="smollm2-135m-shape",
    family="llama",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    rms_norm_eps=1e-5,
    layers=(LayerConfig(),) * 30,
    ropes=(RopeConfig(1e5, 64),),
    max_position=8192,
    tie_embeddings=True,
    eos_token_ids=(2,),
    query_scale=64**-0.5,
)
BLOCK_SIZE = 16


def main() -> None:
    args = _arguments()
    config = open_model(args.model) if args.model else SMOLLM2_135M
    started = time.perf_counter()
    runner = CpuRunner(
        config,
        RunnerSettings(
            threads=args.threads,
            dtype=args.dtype,
            deterministic=args.deterministic,
            load_format="auto" if args.model else "dummy",
            block_size=BLOCK_SIZE,
            max_num_seqs=64,
            max_batch_tokens=512,
            max_model_len=4096,
        ),
    )
    spec = runner.pool_spec(1 + max(64 * 128, 32 * 1024) // BLOCK_SIZE + 64)
    # Not zeros: all pages never written are one physical page, which stays in the cache.
    runner.load(memoryview(bytearray(b"\x3c") * spec.nbytes))
    result: dict[str, Any] = {
        "model": config.name,
        "arithmetic": runner.arithmetic,
        "threads": args.threads,
        "deterministic": args.deterministic,
        "load_seconds": time.perf_counter() - started,
    }
    result["machine"] = {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "torch": version("torch"),
        "python": platform.python_version(),
    }
    peak = _read_bandwidth()
    result["read_gb_per_second"] = peak
    result["decode"] = [
        _decode(runner, config, batch, length, peak, args.repeat)
        for length in (128, 1024)
        for batch in (1, 2, 4, 8, 16, 32)
    ]
    result["prefill"] = [
        _prefill(runner, config, chunk, before, args.repeat)
        for chunk, before in ((32, 0), (128, 0), (512, 0), (512, 512), (512, 2048))
    ]
    text = json.dumps(result, indent=1)
    if args.out:
        args.out.write_text(text + "\n")
    print(text)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="Hugging Face directory; default: dummy weights")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="auto", choices=("auto", "bf16", "fp32"))
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--repeat", type=int, default=7, help="timed steps of each kind; the result is the median")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    return parser.parse_args()


def _decode(
    runner: CpuRunner, config: ModelConfig, batch: int, length: int, peak: float, repeat: int
) -> dict[str, Any]:
    """Time a step that decodes one token for each of `batch` sequences of `length` tokens."""
    each = -(-length // BLOCK_SIZE)
    rows = [
        Row(new_request(config, length, list(range(1 + i * each, 1 + (i + 1) * each))), length - 1, 1, True)
        for i in range(batch)
    ]
    seconds = _median(lambda: runner.execute(StepPlan(rows, batch)), repeat)
    read = weights_bytes(config, runner.arithmetic)
    read += batch * length * runner.pool_spec(1).block_bytes // BLOCK_SIZE
    return {
        "batch": batch,
        "length": length,
        "ms": seconds * 1e3,
        "tokens_per_second": batch / seconds,
        "gb_per_second": read / seconds / 1e9,
        "bandwidth_share": read / seconds / 1e9 / peak,
    }


def _prefill(runner: CpuRunner, config: ModelConfig, chunk: int, before: int, repeat: int) -> dict[str, Any]:
    """Time a step with one chunk of `chunk` tokens, after `before` computed tokens."""
    length = before + chunk
    row = Row(new_request(config, length, list(range(1, 1 + -(-length // BLOCK_SIZE)))), before, chunk, True)
    seconds = _median(lambda: runner.execute(StepPlan([row], 0)), max(3, repeat // 2))
    return {"chunk": chunk, "before": before, "ms": seconds * 1e3, "tokens_per_second": chunk / seconds}


def new_request(config: ModelConfig, length: int, blocks: list[int]) -> Request:
    """Return a request of `length` tokens that holds `blocks`."""
    params = RequestParams(SamplingParams(max_tokens=1, seed=1, temperature=0.0), arrival=0.0)
    return Request(
        rid=1,
        epoch=1,
        frontend=0,
        params=params,
        tokens=[i % min(1000, config.vocab_size) for i in range(length)],
        prompt_len=length,
        block_table=blocks,
    )


def _median(step: Callable[[], Any], repeat: int) -> float:
    """Return the median time of `repeat` calls, after one more."""
    step()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _read_bandwidth() -> float:
    """Return the GB/s at which one thread reads and sums 256 MB."""
    data = np.ones(32 << 20, np.int64)
    return data.nbytes / _median(data.sum, 5) / 1e9


def _cpu() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
