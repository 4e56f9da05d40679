"""The choice of an algorithm for each product of a decode step, by measuring.

cuBLAS guesses the algorithm from the shape. On an H100 another one that cuBLASLt offers was up to 18 % faster for
some numbers of rows. An engine measures them when it loads: they differ between devices and versions of the library.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch

from daemon.engine.cuda.cublaslt import Algorithm, CublasError, CublasLt, Product, Shape
from daemon.engine.cuda.graphs import agrees, replay_seconds
from daemon.engine.cuda.products import Choice, ChosenProduct, ChosenProducts, is_plain
from daemon.engine.cuda.staging import CudaStream
from daemon.engine.cuda.turns import least_seconds
from daemon.engine.cuda.weights import DeviceWeights

log = logging.getLogger(__name__)

MIN_GAIN = 0.02
"""Share of the time that another algorithm must save. Measured times differ by about a hundredth between runs."""

MAX_DIFFERENCE = 2**-6
"""Largest difference between two results, as a share of the largest entry: a few roundings to bfloat16."""

WORKSPACE_BYTES = 32 << 20  # the most that an algorithm may need; torch gives cuBLAS as much on an H100

_TORCH = -1  # in place of the index of an algorithm
_SLOW = 1.05  # of torch's time: after one round, no more rounds for such an algorithm
_ROUNDS = 4
_REPLAYS = 2  # per round


class Limits(NamedTuple):
    """How much is measured. With these an H100 takes one to two seconds for 8 billion weights and 256 rows."""

    seconds: float = 4.0  # for all buckets; torch computes those that come after it
    algorithms: int = 8  # of one product
    min_bytes: int = 4 << 20  # of a weight: for a smaller one a launch takes longer than the product
    read_bytes: int = 256 << 20  # of weights, in one measurement: several times the L2 cache, where they must not be
    products: int = 32  # in one measurement


LIMITS = Limits()


class WeightGroup(NamedTuple):
    """All weights of one shape in a step. `names`: of their products."""

    names: tuple[str, ...]
    weights: tuple[torch.Tensor, ...]
    wide: bool  # the results are float32

    def shape(self, rows: int) -> Shape:
        columns, width = self.weights[0].shape
        return Shape(rows, columns, width, self.wide)


class Timer(Protocol):
    """Measures work on the device."""

    def prepare(self, work: Callable[[], None]) -> Callable[[], float]:
        """Return a function that does `work` and returns its seconds. `work` has run before."""
        ...


class GraphTimer:
    """Measures CUDA graphs, so that no launch from Python is measured."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    def prepare(self, work: Callable[[], None]) -> Callable[[], float]:
        # Not by `torch.cuda.graph`: it collects garbage and empties the allocator's cache, each time. Nothing is
        # allocated in this capture.
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        try:
            work()
        finally:
            graph.capture_end()
        return partial(replay_seconds, graph, self._stream, _REPLAYS)


def choose_products(
    weights: DeviceWeights, buckets: Sequence[int], stream: CudaStream, limits: Limits
) -> ChosenProducts:
    """Measure the products of each of `buckets`, and return the algorithms that are faster than torch's.

    $LLUMD_PRODUCTS=torch: measure nothing, to find faults.
    """
    groups = weight_groups(weights, limits.min_bytes)
    if not groups or os.environ.get("LLUMD_PRODUCTS") == "torch":
        return ChosenProducts({})
    try:
        library = CublasLt(WORKSPACE_BYTES)
    except (OSError, AttributeError, CublasError) as e:
        log.warning("every product is computed by the algorithm that cuBLAS chooses: %s", e)
        return ChosenProducts({})
    stream.stream.wait_stream(torch.cuda.current_stream())  # which may still make the weights
    with torch.cuda.stream(stream.stream):
        chosen = Chooser(library, GraphTimer(stream.stream), limits).choose(groups, buckets)
    stream.stream.synchronize()
    return chosen


def weight_groups(weights: DeviceWeights, min_bytes: int) -> list[WeightGroup]:
    """Return the weights that are worth measuring, by shape. Those with a bias, experts and FP8 stay with torch."""
    groups: dict[tuple[torch.Size, bool], tuple[dict[str, None], list[torch.Tensor]]] = {}

    def add(name: str, weight: torch.Tensor, *, wide: bool) -> None:
        names, members = groups.setdefault((weight.shape, wide), ({}, []))
        names[name] = None
        members.append(weight)

    for layer in weights.layers:
        for name in ("qkv", "out", "gate_up", "down"):
            linear = getattr(layer, name)
            if linear is not None and linear.bias is None and linear.scales is None:
                add(name, linear.weight, wide=False)
    add("head", weights.head, wide=True)
    return [
        WeightGroup(tuple(names), tuple(members), wide)
        for (_, wide), (names, members) in groups.items()
        if members[0].nbytes >= min_bytes and all(map(is_plain, members))
    ]


def fastest(seconds: Mapping[int, float]) -> int:
    """Return the index of the fastest algorithm, or _TORCH if none is faster than it by MIN_GAIN."""
    best = min(seconds, key=seconds.__getitem__)
    return best if seconds[best] <= seconds[_TORCH] * (1 - MIN_GAIN) else _TORCH


class Chooser:
    """Measures the algorithms of products on the current stream."""

    def __init__(self, library: CublasLt, timer: Timer, limits: Limits) -> None:
        self._library = library
        self._timer = timer
        self._limits = limits

    def choose(self, groups: Sequence[WeightGroup], buckets: Sequence[int]) -> ChosenProducts:
        """Measure the largest bucket first: other algorithms gain most for many rows."""
        if not groups or not buckets:
            return ChosenProducts({})
        began = time.perf_counter()
        device = groups[0].weights[0].device
        buffers = _Buffers(groups, max(buckets), device)
        found: dict[Shape, tuple[Product, Algorithm]] = {}
        choices: list[Choice] = []
        for rows in sorted(buckets, reverse=True):
            if time.perf_counter() - began > self._limits.seconds:
                log.warning("products of up to %d rows are not measured: %.1f s are over", rows, self._limits.seconds)
                break
            measured = [self._measure(group, rows, buffers, found) for group in groups]
            _log_gain(rows, measured)
            choices += measured
        needed = max((algorithm.workspace_bytes for _, algorithm in found.values()), default=0)
        workspace = torch.empty(needed, dtype=torch.uint8, device=device)
        products = {shape: ChosenProduct(*pair, workspace) for shape, pair in found.items()}
        seconds = time.perf_counter() - began
        log.info("measured products in %.1f s: %d of %d change", seconds, len(products), len(choices))
        return ChosenProducts(products, choices, seconds)

    def _measure(
        self, group: WeightGroup, rows: int, buffers: _Buffers, found: dict[Shape, tuple[Product, Algorithm]]
    ) -> Choice:
        """Measure the products of a group, and add the best algorithm to `found`."""
        weight = group.weights[0]
        shape = group.shape(rows)
        x, out = buffers.of(shape)
        product = Product(self._library, shape)
        valid = dict(self._valid(product, x, weight, out, buffers.workspace))
        works = {_TORCH: partial(_by_torch, x, out)} | {
            i: partial(_by_algorithm, ChosenProduct(product, algorithm, buffers.workspace), x, out)
            for i, algorithm in valid.items()
        }
        seconds = self._seconds(works, _weights_of_one_run(group.weights, self._limits))
        best = fastest(seconds)
        if best != _TORCH:
            found[shape] = product, valid[best]
        return Choice(rows, group.names, len(group.weights), seconds[_TORCH], seconds[best])

    def _valid(
        self, product: Product, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, workspace: torch.Tensor
    ) -> Iterator[tuple[int, Algorithm]]:
        """Yield the algorithms that give torch's result, by index.

        Each one runs here for the first time: the library then loads its kernels, which may not be captured.
        """
        _by_torch(x, out, weight)
        expected = out.to(torch.float32, copy=True)
        try:
            algorithms = product.algorithms(self._limits.algorithms)
        except CublasError:
            return
        for i, algorithm in enumerate(algorithms):
            out.fill_(torch.nan)  # so that the previous result is not read as this one
            try:
                ChosenProduct(product, algorithm, workspace).compute(x, weight, out)
            except CublasError:
                continue
            if agrees(out.float(), expected, MAX_DIFFERENCE):
                yield i, algorithm
            else:
                log.error("algorithm %d of cuBLASLt gives a wrong product of shape %s: not used", i, list(out.shape))

    def _seconds(
        self, works: Mapping[int, Callable[[torch.Tensor], None]], weights: Sequence[torch.Tensor]
    ) -> dict[int, float]:
        """Return the least seconds of one product, by index. Those that are close to torch get more rounds."""

        def prepare(work: Callable[[torch.Tensor], None]) -> Callable[[], float]:
            return self._timer.prepare(partial(_for_each, work, weights))

        runs = {i: prepare(work) for i, work in works.items()}
        least = least_seconds(runs, 1)
        close = {i: run for i, run in runs.items() if least[i] <= _SLOW * least[_TORCH]}
        if len(close) > 1:
            least |= {i: min(least[i], s) for i, s in least_seconds(close, _ROUNDS).items()}
        return {i: s / len(weights) for i, s in least.items()}


class _Buffers:
    """Random inputs, results, and a workspace. The clock of a GPU depends on the data that it computes with."""

    def __init__(self, groups: Sequence[WeightGroup], rows: int, device: torch.device) -> None:
        self.workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        shapes = [group.shape(rows) for group in groups]
        self._inputs = {
            width: torch.randn(rows, width, device=device).to(torch.bfloat16)
            for width in {shape.width for shape in shapes}
        }
        # In float32 the largest one needs the most bytes of all.
        self._out = torch.empty(max(rows * shape.columns * 4 for shape in shapes), dtype=torch.uint8, device=device)

    def of(self, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
        """Return input and result of a product."""
        dtype = torch.float32 if shape.wide else torch.bfloat16
        out = self._out.view(dtype)[: shape.rows * shape.columns]
        return self._inputs[shape.width][: shape.rows], out.view(shape.rows, shape.columns)


def _by_torch(x: torch.Tensor, out: torch.Tensor, weight: torch.Tensor) -> None:
    """Compute as `Products` does without a choice, but into a buffer."""
    if out.dtype == torch.bfloat16:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.mm(x, weight.t(), out_dtype=out.dtype, out=out)


def _by_algorithm(chosen: ChosenProduct, x: torch.Tensor, out: torch.Tensor, weight: torch.Tensor) -> None:
    chosen.compute(x, weight, out)


def _for_each(work: Callable[[torch.Tensor], None], weights: Sequence[torch.Tensor]) -> None:
    for weight in weights:
        work(weight)


def _weights_of_one_run(weights: Sequence[torch.Tensor], limits: Limits) -> list[torch.Tensor]:
    """Return the weights of one measurement: all of them in turn, until enough bytes are read."""
    count = min(max(1, -(-limits.read_bytes // weights[0].nbytes)), limits.products)
    return [weights[i % len(weights)] for i in range(count)]


def _log_gain(rows: int, choices: Sequence[Choice]) -> None:
    changed = [c for c in choices if c.by_choice < c.by_torch]
    if not changed:
        return
    gains = ", ".join(f"{'/'.join(c.names)} {1 - c.by_choice / c.by_torch:.0%}" for c in changed)
    saved = sum((c.by_torch - c.by_choice) * c.times for c in changed)
    log.info("products of %d rows: %s faster than by cuBLAS's choice, %.3f ms of a step", rows, gains, saved * 1e3)
