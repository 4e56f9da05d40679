"""Linear layers of the CPU engine, with weights packed once for oneDNN, in bf16 or fp32, whichever is faster here."""

from __future__ import annotations

from time import thread_time
from typing import Literal

import torch
import torch.nn.functional as F

from daemon.models.model_config import ModelConfig

Arithmetic = Literal["bf16", "fp32"]

DTYPES: dict[Arithmetic, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}
TILE = 16  # rows of every product in a deterministic engine


class Linear:
    """Computes ``x @ weight.T + bias``: x [rows, in] and the result [rows, out] have the dtype of `weight` [out, in].

    Keeps a packed copy, private to this process, and no reference to `weight`. With `tiled` each product has
    exactly TILE rows; the last one is padded. oneDNN selects its kernel by the shape, and the rounding depends on
    the kernel, so without `tiled` a row's result depends on the number of rows in its batch.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, tiled: bool = False) -> None:
        self.out_features, self.in_features = weight.shape
        self._packable = _packs(weight.dtype)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, None) if self._packable else weight.clone()
        self._bias = bias
        self._tiled = tiled

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not self._tiled:
            return self._product(x)
        padded = F.pad(x, (0, 0, 0, -len(x) % TILE))
        return torch.cat([self._product(tile) for tile in padded.split(TILE)])[: len(x)]

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        if not self._packable:
            return F.linear(x, self._weight, self._bias)
        # F.linear in fp32 would use MKL, which is half as fast on CPUs that are not made by Intel.
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")


def choose_arithmetic(config: ModelConfig) -> Arithmetic:
    """Return bf16 or fp32: the one that computes a layer of this model faster here, for decodes of 1 and 16 rows.

    Takes about 100 to 200 ms: only a part of a wide layer is timed. Without bf16 instructions (AVX-512-BF16 or AMX)
    bf16 is emulated, so the result is fp32, without timing.
    """
    if not _has_bf16():
        return "fp32"
    # Each engine times by itself, and all must choose the same, or no KV can move between them. Native bf16 is nearly
    # twice as fast. The factor favours bf16, so that noise from other processes does not lead to different choices.
    return "bf16" if _layer_seconds(config, "bf16") < 1.5 * _layer_seconds(config, "fp32") else "fp32"


def _packs(dtype: torch.dtype) -> bool:
    """Return True if oneDNN packs weights of `dtype` on this CPU. It packs no bf16 without AVX-512."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype is not torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _has_bf16() -> bool:
    if not _packs(torch.bfloat16):
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _layer_seconds(config: ModelConfig, arithmetic: Arithmetic, budget: float = 0.04) -> float:
    """Return the shortest CPU time of a layer's two widest products at 1 and 16 rows, see `engine.calibrate`.

    `budget`: seconds of timing.
    """
    dtype = DTYPES[arithmetic]
    hidden, inner = min(config.hidden_size, 2048), min(config.mlp_width, 3072)
    with torch.inference_mode():
        gate_up = Linear(torch.full((2 * inner, hidden), 0.01, dtype=dtype))
        down = Linear(torch.full((hidden, inner), 0.01, dtype=dtype))
        inputs = [(torch.ones(rows, hidden, dtype=dtype), torch.ones(rows, inner, dtype=dtype)) for rows in (1, 16)]

        def once() -> float:
            start = thread_time()
            for wide, narrow in inputs:
                gate_up(wide)
                down(narrow)
            return thread_time() - start

        end = thread_time() + budget
        once()
        best = once()
        while thread_time() < end:
            best = min(best, once())
    return best
