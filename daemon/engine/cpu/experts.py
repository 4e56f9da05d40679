"""A mixture of experts on the CPU: rows are grouped by expert, and all rows of an expert are one product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch

from daemon.engine.cpu.linear import Linear
from daemon.engine.cpu.ops import raw
from daemon.models.architecture import ExpertsConfig


class Experts:
    """The experts of one layer. `router` computes the scores of all experts. `gate_up[e]` and `down[e]`: expert e.

    `activate` and `add`: kernels of `Ops`. `activated`: [max tokens * experts per token, width] to write. A row's
    result does not depend on the other rows, bit for bit, if the products are tiled.
    """

    def __init__(
        self,
        config: ExpertsConfig,
        *,
        router: Linear,
        gate_up: Sequence[Linear],
        down: Sequence[Linear],
        activate: Callable[..., None],
        add: Callable[..., None],
        activated: torch.Tensor,
    ) -> None:
        self.linears = router, gate_up[0], down[0]
        self._config = config
        self._router = router
        self._gate_up = gate_up
        self._down = down
        self._activate = activate
        self._add = add
        self._activated = activated

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        per_token = self._config.per_token
        scores = torch.softmax(self._router(x), -1, dtype=torch.float32)
        weights, chosen = scores.topk(per_token)
        order = chosen.flatten().argsort(stable=True)  # by expert: the rows of each one are together
        counts = torch.bincount(chosen.flatten(), minlength=self._config.count).tolist()
        activated = self._activated[: len(order)]
        self._activate(raw(_grouped(self._gate_up, x[order // per_token], counts)), raw(activated))
        rows = _grouped(self._down, activated, counts)
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order))
        out = torch.empty_like(x)
        self._add(raw(rows), raw(places.view_as(chosen)), raw(weights), self._config.normalise, raw(out))
        return out


def _grouped(linears: Sequence[Linear], rows: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Return the products of the rows: the first ``counts[0]`` by the first layer, and so on."""
    ends = accumulate(counts)
    parts = [
        linear(rows[end - count : end]) for linear, count, end in zip(linears, counts, ends, strict=True) if count
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
