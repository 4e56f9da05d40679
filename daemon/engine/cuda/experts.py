"""The mixture of experts of a layer: each token goes to a few experts, and each expert multiplies its tokens at once.

The products are `torch._grouped_mm`: one call for all experts, whose kernel finds on the device how many rows each
expert has. So nothing here waits for the device, and decodes can be captured in a graph. On other GPUs than those of
`kernels.EXPERT_ARCHS` torch computes it expert by expert and waits for the numbers of rows, so these are refused.
"""

from __future__ import annotations

import torch

from daemon.engine.cuda.ops import Ops
from daemon.engine.cuda.weights import Experts
from daemon.models.architecture import ExpertsConfig


class Mixture:
    """Computes mixtures with the same counts. Rows of one token need `per_token` times the memory of a dense MLP."""

    def __init__(self, config: ExpertsConfig, ops: Ops) -> None:
        self._config = config
        self._ops = ops

    def apply(self, experts: Experts, x: torch.Tensor, out: torch.Tensor) -> None:
        """Write the weighted sum of the chosen experts' outputs for x [n, hidden] to out [n, hidden]."""
        weights, chosen = self._route(experts.router, x)
        # Rows in the order of their experts. `order`: index of each row among all choices, token by token.
        sorted_experts, order = chosen.flatten().sort(stable=True)
        every = torch.arange(self._config.count, device=x.device, dtype=sorted_experts.dtype)
        ends = torch.searchsorted(sorted_experts, every, right=True, out_int32=True)
        rows = x.index_select(0, order // self._config.per_token)
        gate_up = torch._grouped_mm(rows, experts.gate_up.transpose(1, 2), offs=ends)
        gated = gate_up.new_empty(len(rows), self._config.width)
        self._ops.silu_mul(gate_up, gated)
        down = torch._grouped_mm(gated, experts.down.transpose(1, 2), offs=ends)
        by_token = torch.empty_like(down).index_copy_(0, order, down)
        terms = by_token.unflatten(0, (len(x), self._config.per_token))
        torch.bmm(weights.unsqueeze(1), terms, out=out.unsqueeze(1))

    def _route(self, router: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weight and index of the experts of each token: [n, per_token] each."""
        scores = torch.empty(len(x), len(router), dtype=torch.float32, device=x.device)
        self._ops.project(x, router, scores)
        weights, chosen = torch.softmax(scores, -1).topk(self._config.per_token)
        if self._config.normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights.to(x.dtype), chosen
