"""The products of a step with the model's weights: by torch, which calls cuBLAS, or by an algorithm that was chosen
for the shape of the product (`product_choice.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from daemon.engine.cuda import fp8
from daemon.engine.cuda.cublaslt import ALIGNMENT, Algorithm, Product, Shape
from daemon.engine.cuda.ops import Ops
from daemon.engine.cuda.weights import Linear


class ChosenProduct:
    """Products of one shape by one algorithm, on the current stream.

    `workspace`: uint8 on the device. Products with the same workspace must be in one stream.
    """

    def __init__(self, product: Product, algorithm: Algorithm, workspace: torch.Tensor) -> None:
        self._product = product
        self._algorithm = algorithm
        self._workspace = workspace

    def compute(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        """Write x @ weight.T to `out`. Raises CublasError if the algorithm cannot do it."""
        stream = torch.cuda.current_stream().cuda_stream if out.is_cuda else 0
        pointers = weight.data_ptr(), x.data_ptr(), out.data_ptr(), self._workspace.data_ptr()
        self._product.compute(self._algorithm, *pointers, stream)


class Choice(NamedTuple):
    """What was measured for one product, in seconds. `times`: how often a step computes it."""

    rows: int
    names: tuple[str, ...]
    times: int
    by_torch: float
    by_choice: float


class ChosenProducts(NamedTuple):
    """The algorithms that are faster than torch's, all measurements, and the seconds that they took."""

    by_shape: Mapping[Shape, ChosenProduct]
    choices: Sequence[Choice] = ()
    seconds: float = 0.0


class Products:
    """Computes each product by the algorithm in `chosen`, or by torch if its shape is not there."""

    def __init__(self, ops: Ops) -> None:
        self.chosen = ChosenProducts({})
        self._ops = ops

    def apply(self, linear: Linear, x: torch.Tensor, out: torch.Tensor) -> None:
        """Write x [n, width] through `linear` to `out` [n, columns], which must be plain (`is_plain`)."""
        if linear.scales is not None:
            fp8.multiply(x, linear.transposed, linear.scales, linear.bias, out)
        elif linear.bias is not None:
            torch.addmm(linear.bias, x, linear.transposed, out=out)
        elif chosen := self._find(x, linear.weight, wide=False):
            chosen.compute(x, linear.weight, out)
        else:
            torch.mm(x, linear.transposed, out=out)

    def project(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        """Write x @ weight.T to `out`, float32 [n, vocab]. See `Ops.project`."""
        chosen = self._find(x, weight, wide=True) if is_plain(out) else None
        if chosen is None:
            self._ops.project(x, weight, out)
        else:
            chosen.compute(x, weight, out)

    def _find(self, x: torch.Tensor, weight: torch.Tensor, *, wide: bool) -> ChosenProduct | None:
        if not self.chosen.by_shape:
            return None
        chosen = self.chosen.by_shape.get(Shape(len(x), weight.shape[0], weight.shape[1], wide))
        return chosen if chosen and is_plain(x) else None


def is_plain(tensor: torch.Tensor) -> bool:
    """Return True if a `Product` can read or write the tensor."""
    return tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0
