"""What a decode step costs the host before the device can begin: slots and arrays, in microseconds.

    python -m bench.step_arrays [--rows 256] [--blocks 64]

Every row has `--blocks` KV blocks of 16 tokens; each step every row is one token further, so that a sixteenth of them
takes another block. No torch, no GPU.
"""

from __future__ import annotations

import argparse
import statistics
from time import perf_counter

import numpy as np

from daemon.engine.cuda.arrays import DrawParams, Inputs, Size, StepArrays, input_fields
from daemon.engine.cuda.slots import Slots
from daemon.engine.request import Request
from daemon.engine.runner import Row
from daemon.ipc.messages import RequestParams, SamplingParams

_BLOCK_SIZE = 16


def measure(rows: int, blocks: int, steps: int = 300) -> list[float]:
    """Seconds of each of `steps` decode steps of `rows` requests with about `blocks` blocks."""
    longest = (blocks + 1) * _BLOCK_SIZE + steps
    arrays, slots = StepArrays(2 * rows, longest, _BLOCK_SIZE), Slots[Request](2 * rows)
    room = Size(rows, rows, rows, rows * -(-longest // _BLOCK_SIZE))
    inputs = Inputs(*(np.zeros(length, dtype) for _, dtype, length in input_fields(room)))
    requests = [_request(i, blocks * _BLOCK_SIZE - i % _BLOCK_SIZE, longest) for i in range(rows)]
    seconds = []
    for step in range(steps):
        plan = [Row(r, r.num_computed + step, 1, True) for r in requests]
        start = perf_counter()
        mine, fresh = slots.assign([row.request for row in plan])
        for slot, request in fresh:
            arrays.adopt(slot, request, DrawParams(1.0, -np.inf, 0, 1.0, 0))
        arrays.on_host(plan, mine)
        size = arrays.decodes(plan, mine, rows, inputs)
        arrays.check_unknown(inputs, size)
        arrays.note_drawn(inputs, size)
        seconds.append(perf_counter() - start)
    return seconds


def _request(rid: int, length: int, longest: int) -> Request:
    params = RequestParams(SamplingParams(max_tokens=longest, seed=rid), arrival=0.0)
    table = list(range(1, longest // _BLOCK_SIZE + 2))
    return Request(rid, 1, 0, params, [7] * (longest + 1), length, block_table=table, num_computed=length - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=64)
    args = parser.parse_args()
    seconds = measure(args.rows, args.blocks)
    print(
        f"{args.rows} rows x {args.blocks} blocks: median {statistics.median(seconds) * 1e6:.0f} us, "
        f"p90 {statistics.quantiles(seconds, n=10)[-1] * 1e6:.0f} us"
    )


if __name__ == "__main__":
    main()
