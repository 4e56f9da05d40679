"""Products with e4m3 weights, which FP8 checkpoints have: half the memory of bf16, and half the bytes to read.

The rows of the input are rounded to e4m3 too, each with a factor of its own that brings its largest entry to the
largest e4m3 number. No speed has been measured yet.
"""

from __future__ import annotations

import logging

import torch

from daemon.engine.cuda import kernels
from daemon.engine.cuda.graphs import agrees

log = logging.getLogger(__name__)

E4M3 = torch.float8_e4m3fn
MULTIPLE = 16  # rows and columns of a weight must be multiples of it
_LARGEST = 448.0  # of e4m3
_SMALLEST_SCALE = 1e-12  # so that rows of zeros stay zeros
_MAX_DIFFERENCE = 2**-6  # of a product, as a share of its largest entry: a few roundings to bfloat16


def round_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x [n, width] as e4m3, and the factor of each row, float32[n, 1]."""
    scales = (x.abs().amax(-1, keepdim=True).float() / _LARGEST).clamp_(min=_SMALLEST_SCALE)
    return (x / scales).to(E4M3), scales


def multiply(
    x: torch.Tensor, transposed: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    """Write the product of x [n, in], rounded, with an e4m3 weight to `out` [n, columns].

    `transposed`: the weight as a view [in, columns]. `scales`: factors of its columns, float32[1, columns].
    """
    rounded, row_scales = round_rows(x)
    torch._scaled_mm(rounded, transposed, scale_a=row_scales, scale_b=scales, bias=bias, out_dtype=out.dtype, out=out)


@torch.inference_mode()
def is_supported(device: torch.device) -> bool:
    """Return True if `multiply` works on a GPU: tried once, with a small product.

    It needs compute capability 8.9, and PyTorch has its kernels for some devices only.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < kernels.FP8_CAPABILITY:
        return False
    x, weight = (torch.linspace(-1, 1, n * 256, device=device).view(n, 256) for n in (8, 64))
    values, factors = round_rows(weight)
    rounded, row_scales = round_rows(x.bfloat16())
    expected = (rounded.float() * row_scales) @ (values.float() * factors).t()
    out = torch.full_like(expected, torch.nan, dtype=torch.bfloat16)
    try:
        multiply(x.bfloat16(), values.t(), factors.t().contiguous(), None, out)
    except (RuntimeError, ValueError) as e:
        log.warning("PyTorch does not multiply FP8 on this device, so FP8 weights become bf16: %s", e)
        return False
    if agrees(out.float(), expected, _MAX_DIFFERENCE):
        return True
    log.error("PyTorch multiplies FP8 wrongly on this device, so FP8 weights become bf16")
    return False
