"""CUDA graphs of decode steps: one per bucket, captured once, replayed each step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial

import torch

from daemon.engine.cuda.staging import CudaStream
from daemon.engine.cuda.turns import least_seconds

log = logging.getLogger(__name__)

Step = Callable[[], None]

MAX_DIFFERENCE = 0.25
"""Largest difference between the outputs of two paths, as a share of the largest entry.

Roundings to bfloat16 cause a hundredth of it in two layers, several hundredths in many layers. A wrong product is
wrong in every layer, and soon differs by the whole entry.
"""

_ROUNDS = 5
_REPLAYS = 4  # per round


class DecodeGraphs:
    """Captures buckets and replays them, on one stream.

    All graphs share memory. Capture the largest bucket first: the others then fit in the memory that it needed.

    Several paths may compute a bucket. The first one is the reference. Another path is used if it is faster on this
    device and its output agrees.
    """

    def __init__(self, stream: CudaStream) -> None:
        self.seconds: dict[int, dict[str, float]] = {}  # of a step, by bucket and path; only with several paths
        self.paths: dict[int, str] = {}  # the path used, by bucket
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._stream = stream.stream
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, bucket: int, paths: Mapping[str, Step], output: torch.Tensor) -> None:
        """Capture each of `paths`, and keep one. The device holds a valid step; `output`: where its result goes.

        Each path runs once before its capture: libraries initialise themselves in their first call, which may not be
        captured.
        """
        graphs = {path: self._capture(step) for path, step in paths.items()}
        self.paths[bucket] = next(iter(paths)) if len(paths) == 1 else self._fastest(bucket, graphs, output)
        self._graphs[bucket] = graphs[self.paths[bucket]]

    def replay(self, bucket: int) -> None:
        """Compute a decode step of `bucket` rows from the static buffers, on the current stream."""
        self._graphs[bucket].replay()

    def _capture(self, step: Step) -> torch.cuda.CUDAGraph:
        with torch.cuda.stream(self._stream):
            step()
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            step()
        return graph

    def _fastest(self, bucket: int, graphs: Mapping[str, torch.cuda.CUDAGraph], output: torch.Tensor) -> str:
        """Return the fastest of the paths that agree with the first one."""
        reference, *others = graphs
        expected = self._output(graphs[reference], output)
        valid = {reference: graphs[reference]}
        for path in others:
            if agrees(self._output(graphs[path], output), expected):
                valid[path] = graphs[path]
            else:
                log.error(
                    "decodes of %d rows by %s give other logits than by %s on this device: not used",
                    bucket,
                    path,
                    reference,
                )
        seconds = self._time(valid)
        self.seconds[bucket] = seconds
        log.info(
            "decodes of %d rows: %s", bucket, ", ".join(f"{path} {s * 1e3:.2f} ms" for path, s in seconds.items())
        )
        return min(seconds, key=seconds.__getitem__)

    def _output(self, graph: torch.cuda.CUDAGraph, output: torch.Tensor) -> torch.Tensor:
        with torch.cuda.stream(self._stream):
            output.fill_(torch.nan)  # so that the previous path's output is not read as this one's
            graph.replay()
            return output.cpu()

    def _time(self, graphs: Mapping[str, torch.cuda.CUDAGraph]) -> dict[str, float]:
        """Return the least seconds of a replay, by path."""
        runs = {path: partial(replay_seconds, graph, self._stream, _REPLAYS) for path, graph in graphs.items()}
        return least_seconds(runs, _ROUNDS)


def replay_seconds(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, replays: int) -> float:
    """Return the seconds of a replay on `stream`: the mean of `replays` ones behind another one."""
    began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(stream):
        graph.replay()
        began.record()
        for _ in range(replays):
            graph.replay()
        ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / 1e3 / replays


def agrees(output: torch.Tensor, expected: torch.Tensor, most: float = MAX_DIFFERENCE) -> bool:
    """Return True if the outputs differ by at most this share of the largest entry. False if there is a NaN."""
    return bool((output - expected).abs().max() <= most * expected.abs().max())
