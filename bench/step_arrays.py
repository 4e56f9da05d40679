"""Host time of a decode step before the device can begin: slots and arrays, in microseconds.

    python -m bench.step_arrays [--rows 256] [--blocks 64]

Every row has `--blocks` KV blocks of 16 tokens. Each step adds one token to every row, so one row in 16 gets a new
block. No torch, no GPU.
"""

from __future__ import annotations

import argparse
import statistics
from time import perf_counter

import numpy as np

from daemon.engine.cuda.arrays import Inputs, Size, SlotSampling, StepArrays, input_fields
from daemon.engine.cuda.slots import Slots
from daemon.engine.request import Request
from daemon.engine.runner import Row
from daemon.ipc.messages import RequestParams, SamplingParams

_BLOCK_SIZE = 16


def measure(rows: int, blocks: int, steps: int = 300) -> list[float]:
    """Return the seconds of each of `steps` decode steps of `rows` requests with about `blocks` blocks."""
    max_len = (blocks + 1) * _BLOCK_SIZE + steps
    arrays, slots = StepArrays(2 * rows, max_len, _BLOCK_SIZE), Slots[Request](2 * rows)
    room = Size(rows, rows, rows, rows * -(-max_len // _BLOCK_SIZE))
    inputs = Inputs(*(np.zeros(length, dtype) for _, dtype, length in input_fields(room)))
    requests = [_request(i, blocks * _BLOCK_SIZE - i % _BLOCK_SIZE, max_len) for i in range(rows)]
    seconds = []
    for step in range(steps):
        plan = [Row(r, r.num_computed + step, 1, True) for r in requests]
        start = perf_counter()
        slots_of_rows, new = slots.assign([row.request for row in plan])
        for slot, request in new:
            arrays.assign_slot(slot, request, SlotSampling(1.0, -np.inf, 0, 1.0, 0))
        arrays.host_rows(plan, slots_of_rows)
        size = arrays.decodes(plan, slots_of_rows, rows, inputs)
        arrays.check_unknown(inputs, size)
        arrays.note_sampled(inputs, size)
        seconds.append(perf_counter() - start)
    return seconds


def _request(rid: int, length: int, max_len: int) -> Request:
    params = RequestParams(SamplingParams(max_tokens=max_len, seed=rid), arrival=0.0)
    table = list(range(1, max_len // _BLOCK_SIZE + 2))
    return Request(rid, 1, 0, params, [7] * (max_len + 1), length, block_table=table, num_computed=length - 1)


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
