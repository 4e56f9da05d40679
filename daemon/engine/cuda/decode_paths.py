"""How the decodes of each bucket are computed: which path, and by a CUDA graph or without one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal, get_args

import torch

from daemon.engine.cuda.forward import ForwardPass
from daemon.engine.cuda.graphs import DecodeGraphs
from daemon.engine.cuda.small_batch import DecodePath
from daemon.engine.cuda.staging import CudaStream


class DecodePaths:
    """The paths that can compute a bucket.

    `small_buckets`: buckets that `SmallBatch` can compute. `wanted`: the path for these; "auto": all paths are
    captured, and the fastest one is kept.
    """

    def __init__(
        self, forward: ForwardPass, small_buckets: Sequence[int], wanted: DecodePath | Literal["auto"]
    ) -> None:
        self._forward = forward
        self._small_buckets = frozenset(small_buckets)
        self._wanted = wanted

    def of(self, bucket: int) -> Mapping[str, Callable[[], None]]:
        """Return the functions that compute `bucket`, by path. The first path is the reference for the others."""
        if bucket not in self._small_buckets:
            paths: tuple[DecodePath, ...] = ("gemm",)
        else:
            paths = get_args(DecodePath) if self._wanted == "auto" else (self._wanted,)
        return {path: partial(self._forward.decode, bucket, path) for path in paths}

    def run(self, bucket: int) -> None:
        """Compute `bucket` by its first path, without a graph."""
        next(iter(self.of(bucket).values()))()

    def capture(self, stream: CudaStream, buckets: Sequence[int], prepare: Callable[[int], None]) -> DecodeGraphs:
        """Capture all `buckets` (ascending), the largest one first.

        `prepare` puts valid decodes of a bucket on the device.
        """
        graphs = DecodeGraphs(stream)
        for bucket in reversed(buckets):
            with torch.cuda.stream(stream.stream):
                prepare(bucket)
            graphs.capture(bucket, self.of(bucket), self._forward.logits[:bucket])
        return graphs
