"""Arguments of an append kernel: tokens of some sequences, their pages, and fused products to append."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from daemon.engine.cuda.ops import HeadNorms
from daemon.engine.cuda.workspace import HeadShape
from daemon.engine.rope import rope_tables
from daemon.models.architecture import RopeConfig

BEFORE = 150  # at most so many tokens are already in the pages
LONGEST = 1200


class Paged:
    """`counts`: tokens of each sequence, after a random number of earlier ones. All tensors are on `device`.

    `rotated`: columns of a head that are rotated; 0: all.
    """

    def __init__(
        self, shape: HeadShape, counts: list[int], rng: np.random.Generator, device: str = "cpu", *, rotated: int = 0
    ) -> None:
        self.shape = shape
        starts = [int(rng.integers(0, BEFORE)) for _ in counts]
        pages = [-(-(start + count) // shape.block_size) for start, count in zip(starts, counts, strict=True)]
        indptr = np.concatenate([[0], np.cumsum(pages)])
        self.blocks = int(indptr[-1]) + 1
        arrays = {
            "kv_indices": rng.permutation(self.blocks)[: indptr[-1]],
            "kv_indptr": indptr,
            "rows": np.repeat(np.arange(len(counts)), counts),
            "positions": np.concatenate([np.arange(s, s + n) for s, n in zip(starts, counts, strict=True)]),
        }
        self.inputs: Any = SimpleNamespace(
            **{name: torch.from_numpy(array.astype(np.int32)).to(device) for name, array in arrays.items()}
        )
        rope = RopeConfig(1e4, rotated or shape.head_dim)
        self.angles = torch.cat([torch.from_numpy(t) for t in rope_tables(rope, LONGEST)], 1).to(device)
        width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        fused = torch.from_numpy(rng.standard_normal((sum(counts), width), np.float32) * 3)
        self.fused = fused.to(device=device, dtype=torch.bfloat16)

    def qkv(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return slices of one fused product, as a model passes them. Each call returns a new copy."""
        heads = self.fused.clone().unflatten(1, (-1, self.shape.head_dim))
        q, k, v = heads.split([self.shape.heads, self.shape.kv_heads, self.shape.kv_heads], 1)
        return q, k, v

    def norms(self, offset: float) -> HeadNorms:
        """Return random norms of heads, whose weights are about 1 with `offset` added."""
        generator = torch.Generator().manual_seed(int(self.fused.shape[0]))
        weights = torch.randn(2, self.shape.head_dim, generator=generator) * 0.2 + 1 - offset
        q, k = weights.to(device=self.fused.device, dtype=torch.bfloat16)
        return HeadNorms(q, k, 1e-6)

    def pages(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of one of three layers, all zeros."""
        _, kv_heads, head_dim, block_size = self.shape
        shape = (self.blocks, 3, 2, block_size, kv_heads, head_dim)
        pool = torch.zeros(shape, dtype=torch.bfloat16, device=self.fused.device).to(dtype)
        return pool[:, 1, 0], pool[:, 1, 1]
