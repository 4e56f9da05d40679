"""CUDA graphs of decode steps: one a bucket, captured once, replayed each step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from daemon.engine.cuda.staging import CudaStream


class Graphs:
    """Captures `step(bucket)` for every bucket and replays it.

    The largest goes first: the others then find room in the memory it needed, which all share. Each runs once
    before its capture, after `prepare(bucket)` has given it something valid to compute: libraries set themselves
    up in their first call, and that may not be captured.
    """

    def __init__(self, buckets: Sequence[int], prepare: Callable[[int], None], step: Callable[[int], None],
                 stream: CudaStream) -> None:
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        pool = torch.cuda.graph_pool_handle()
        for bucket in sorted(buckets, reverse=True):
            with torch.cuda.stream(stream.stream):
                prepare(bucket)
                step(bucket)
            stream.stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream.stream):
                step(bucket)
            self._graphs[bucket] = graph

    def replay(self, bucket: int) -> None:
        """Compute a decode step of `bucket` rows from the static buffers, on the current stream."""
        self._graphs[bucket].replay()
