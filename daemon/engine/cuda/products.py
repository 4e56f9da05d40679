"""The products of a step with the model's weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from daemon.engine.cuda.ops import Ops
from daemon.engine.cuda.weights import Linear


class Products:
    """Computes each product by torch."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops

    def apply(self, linear: Linear, x: torch.Tensor) -> torch.Tensor:
        """Return x [n, width] through `linear`, [n, columns]."""
        return F.linear(x, linear.weight, linear.bias)

    def project(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        """Write x @ weight.T to `out`, float32 [n, vocab]. See `Ops.project`."""
        self._ops.project(x, weight, out)
