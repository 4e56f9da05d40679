"""CUDA graphs of decode steps: one a bucket, captured once, replayed each step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch

from daemon.engine.cuda.staging import CudaStream

log = logging.getLogger(__name__)

Step = Callable[[], None]

ALIKE = 0.25
"""By how much of the largest entry the outcomes of two ways may differ. Roundings to bfloat16 make a hundredth of it
in two layers, several in many; what is wrong in a product is so in every layer, and soon differs by all of it."""

_ROUNDS = 5
_REPLAYS = 4  # a round


class Graphs:
    """Captures buckets and replays them, on one stream. All share memory: capture the largest first, the others
    then find room in what it needed.

    A bucket may be computed in several ways, of which the first is certain. Another is taken if it is quicker on
    this device and comes to the same outcome.
    """

    def __init__(self, stream: CudaStream) -> None:
        self.seconds: dict[int, dict[str, float]] = {}  # a step of a bucket takes, by way, where there is a choice
        self.ways: dict[int, str] = {}  # the way taken
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._stream = stream.stream
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, bucket: int, ways: Mapping[str, Step], outcome: torch.Tensor) -> None:
        """Capture each of `ways`, keep one. Something valid to compute is on the device; `outcome`: where it ends up.

        Each way runs once before its capture: libraries set themselves up in their first call, and that may not be
        captured.
        """
        graphs = {way: self._capture(step) for way, step in ways.items()}
        self.ways[bucket] = next(iter(ways)) if len(ways) == 1 else self._best(bucket, graphs, outcome)
        self._graphs[bucket] = graphs[self.ways[bucket]]

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

    def _best(self, bucket: int, graphs: Mapping[str, torch.cuda.CUDAGraph], outcome: torch.Tensor) -> str:
        sure, *others = graphs
        expected = self._outcome(graphs[sure], outcome)
        alike = {sure: graphs[sure]}
        for way in others:
            if _alike(self._outcome(graphs[way], outcome), expected):
                alike[way] = graphs[way]
            else:
                log.error(
                    "decodes of %d rows by %s come to other logits than by %s on this device: not used",
                    bucket,
                    way,
                    sure,
                )
        seconds = self._time(alike)
        self.seconds[bucket] = seconds
        log.info("decodes of %d rows: %s", bucket, ", ".join(f"{way} {s * 1e3:.2f} ms" for way, s in seconds.items()))
        return min(seconds, key=seconds.__getitem__)

    def _outcome(self, graph: torch.cuda.CUDAGraph, outcome: torch.Tensor) -> torch.Tensor:
        with torch.cuda.stream(self._stream):
            outcome.fill_(torch.nan)  # what the other way has left there must not pass for this one's
            graph.replay()
            return outcome.cpu()

    def _time(self, graphs: Mapping[str, torch.cuda.CUDAGraph]) -> dict[str, float]:
        """Least seconds of a replay, by turns: what slows the device down for a while meets all."""
        rounds = [{way: self._seconds(graph) for way, graph in graphs.items()} for _ in range(_ROUNDS)]
        return {way: min(times[way] for times in rounds) for way in graphs}

    def _seconds(self, graph: torch.cuda.CUDAGraph) -> float:
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(self._stream):
            graph.replay()
            began.record()
            for _ in range(_REPLAYS):
                graph.replay()
            ended.record()
        ended.synchronize()
        return began.elapsed_time(ended) / 1e3 / _REPLAYS


def _alike(outcome: torch.Tensor, expected: torch.Tensor) -> bool:
    """Not with a NaN."""
    return bool((outcome - expected).abs().max() <= ALIKE * expected.abs().max())
