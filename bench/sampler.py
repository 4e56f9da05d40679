"""Time of the CPU sampler, in microseconds per row.

    python -m bench.sampler [ROWS] [THREADS] [--repeat 15]

There are two shapes of logits: *peaked*, as of a trained model (few tokens are likely), and *flat*, as of a random
one.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from daemon.engine.request import Request
from daemon.engine.sampling.sampler import Sampler
from daemon.ipc.messages import RequestParams, SamplingParams

VOCABULARIES = (49152, 128256)

CASES: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {},
    "top-p 0.9": {"top_p": 0.9},
    "top-k 50": {"top_k": 50},
    "top-k 50, top-p 0.9": {"top_k": 50, "top_p": 0.9},
    "min-p 0.05": {"min_p": 0.05},
    "penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    "penalties, 5 logprobs": {"repetition_penalty": 1.1, "presence_penalty": 0.5, "logprobs": 5},
}


def logits_of(shape: str, rows: int, vocab: int) -> torch.Tensor:
    """Return logits, float32[rows, vocab], always the same."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, vocab, generator=generator) * 2.5
    if shape == "peaked":
        logits[:, :10] = 10 + 10 * torch.rand(rows, 10, generator=generator)
    return logits


def requests_of(rows: int, vocab: int, options: dict[str, float]) -> list[Request]:
    """Return requests with a prompt of 1024 tokens and 256 output tokens."""
    tokens = torch.randint(vocab, (rows, 1280), generator=torch.Generator().manual_seed(1)).tolist()
    params = [
        RequestParams(SamplingParams(max_tokens=512, seed=row, **options), 0.0)  # type: ignore[arg-type]
        for row in range(rows)
    ]
    return [
        Request(rid=row, epoch=0, frontend=0, params=params[row], tokens=tokens[row], prompt_len=1024)
        for row in range(rows)
    ]


def microseconds_per_row(
    vocab: int, shape: str, options: dict[str, float], rows: int, threads: int, repeat: int
) -> float:
    """Return the median of `repeat` steps, each at a new position."""
    sampler = Sampler(vocab, threads)
    logits = logits_of(shape, rows, vocab)
    requests = requests_of(rows, vocab, options)
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        result = sampler.sample(logits, requests)
        times.append(time.perf_counter() - start)
        for request, token in zip(requests, result.tokens, strict=True):
            request.tokens.append(token)
    return statistics.median(times) / rows * 1e6


def main() -> None:
    """Print one line per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=int, nargs="?", default=16)
    parser.add_argument("threads", type=int, nargs="?", default=1)
    parser.add_argument("--repeat", type=int, default=15, help="timed steps of each kind; the result is the median")
    args = parser.parse_args()
    print(f"{args.rows} rows, {args.threads} thread(s), µs per row")
    print(f"{'':24}" + "".join(f"{vocab:>9} {shape:<7}" for vocab in VOCABULARIES for shape in ("peaked", "flat")))
    for name, options in CASES.items():
        cells = [
            microseconds_per_row(vocab, shape, options, args.rows, args.threads, args.repeat)
            for vocab in VOCABULARIES
            for shape in ("peaked", "flat")
        ]
        print(f"{name:24}" + "".join(f"{cell:9.1f} {'':7}" for cell in cells))


if __name__ == "__main__":
    main()
