"""Quantised checkpoints, packed from the definitions of their formats, with the matrices that they mean.

Each function of `METHODS` invents the whole numbers of a matrix [out, in], and returns the tensors that a tool of the
method stores, and the matrix. Nothing here uses the code under test.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

Stored = dict[str, torch.Tensor]
Made = tuple[Stored, torch.Tensor]
GROUP = 16
BLOCK = (24, 40)  # does not divide the matrices


class Maker:
    """Makes matrices of one shape from its own random numbers."""

    def __init__(self, rng: np.random.Generator, out: int, width: int) -> None:
        self.rng = rng
        self.out = out
        self.width = width

    def scales(self, *shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        """Return scales that keep the matrix as large as those of an unquantised model."""
        return torch.tensor(self.rng.uniform(0.5, 2.0, shape) * 0.02, dtype=dtype)

    def whole(self, low: int, high: int, *shape: int) -> torch.Tensor:
        """Return whole numbers from `low` to `high`, both included."""
        return torch.from_numpy(self.rng.integers(low, high + 1, shape or (self.out, self.width)))

    def index(self, groups: int) -> torch.Tensor:
        """Return the group of each input, in a random order."""
        return torch.from_numpy(self.rng.permutation(np.arange(self.width) % groups)).int()


def pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack the columns [rows, n] into int32 words, the first one into the lowest bits of a word."""
    per = 32 // bits
    words = np.zeros((len(values), -(-values.shape[1] // per)), np.uint64)
    for column, number in enumerate(values.T.numpy().astype(np.uint64)):
        words[:, column // per] |= number << np.uint64(bits * (column % per))
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))


def blocks(values: torch.Tensor, rows: int, columns: int, out: int, width: int) -> torch.Tensor:
    """Return the value of each element: that of its block."""
    return values.float()[torch.arange(out) // rows][:, torch.arange(width) // columns]


def fp8_blocks(m: Maker) -> Made:
    q = m.whole(-200, 200).float().to(torch.float8_e4m3fn)
    s = m.scales(-(-m.out // BLOCK[0]), -(-m.width // BLOCK[1]), dtype=torch.bfloat16) * 0.05
    return {"weight": q, "weight_scale_inv": s}, q.float() * blocks(s, *BLOCK, m.out, m.width)


def fp8_tensor(m: Maker) -> Made:
    q = torch.from_numpy(m.rng.integers(0, 0x7F, (m.out, m.width), dtype=np.uint8)).view(torch.float8_e4m3fn)
    s = m.scales(dtype=torch.float32) * 0.01
    return {"weight": q, "weight_scale": s, "input_scale": torch.ones(1)}, q.float() * s


def fp8_rows(m: Maker) -> Made:
    q = m.whole(-100, 100).float().to(torch.float8_e4m3fn)
    s = m.scales(m.out, 1, dtype=torch.bfloat16) * 0.1
    return {"weight": q, "weight_scale": s}, q.float() * s.float()


def int8_tensor(m: Maker) -> Made:
    q, s = m.whole(-128, 127), m.scales(1, dtype=torch.bfloat16) * 0.1
    return {"weight": q.to(torch.int8), "weight_scale": s, "weight_zero_point": torch.zeros(1).char()}, q * s.float()


def int8_rows_with_zeros(m: Maker) -> Made:
    q, s, z = m.whole(-128, 127), m.scales(m.out, 1) * 0.1, m.whole(-9, 9, m.out, 1)
    return {"weight": q.to(torch.int8), "weight_scale": s, "weight_zero_point": z.to(torch.int8)}, (q - z) * s.float()


def _packed(m: Maker, bits: int, groups: int, *, zeros: bool = False, index: bool = False) -> Made:
    half = 2 ** (bits - 1)
    q, s = m.whole(-half, half - 1), m.scales(m.out, groups, dtype=torch.bfloat16) * (1 if bits == 4 else 0.1)
    z = m.whole(-half, half - 1, m.out, groups) if zeros else torch.zeros(m.out, groups).long()
    stored = {"weight_packed": pack(q + half, bits), "weight_scale": s, "weight_shape": torch.tensor(q.shape)}
    if zeros:
        stored["weight_zero_point"] = pack((z + half).T, bits).T.contiguous()
    of = m.index(groups) if index else torch.arange(m.width) // (m.width // groups)
    if index:
        stored["weight_g_idx"] = of
    return stored, (q - z[:, of.long()]) * s.float()[:, of.long()]


def _with(made: Made, name: str, tensor: torch.Tensor) -> Made:
    return made[0] | {name: tensor}, made[1]


def _gptq(m: Maker, bits: int, groups: int, offset: int, *, index: bool = True, ordered: bool = True) -> Made:
    q, s = m.whole(0, 2**bits - 1), m.scales(m.out, groups) * (1 if bits == 4 else 0.1)
    z = m.whole(offset, 2**bits - 1, m.out, groups)
    of = torch.arange(m.width).int() // (m.width // groups) if ordered else m.index(groups)
    stored = {
        "qweight": pack(q, bits).T.contiguous(),
        "scales": s.T.contiguous(),
        "qzeros": pack((z - offset).T, bits),
        "bias": torch.zeros(m.out),
    } | ({"g_idx": of} if index else {})
    return stored, (q - z[:, of.long()]) * s.float()[:, of.long()]


def awq(m: Maker) -> Made:
    q, s, z = m.whole(0, 15), m.scales(m.out, m.width // GROUP), m.whole(0, 15, m.out, m.width // GROUP)
    order = [8 * (i // 8) + (0, 2, 4, 6, 1, 3, 5, 7)[i % 8] for i in range(m.out)]  # output of each place in a word
    stored = {"qweight": pack(q[order].T, 4), "qzeros": pack(z[order].T, 4), "scales": s.T.contiguous()}
    return stored, (q - blocks(z, 1, GROUP, m.out, m.width)) * blocks(s, 1, GROUP, m.out, m.width)


def compressed(
    layout: str, *weights: dict[str, Any], targets: tuple[list[str], ...] = (["Linear"],)
) -> dict[str, Any]:
    """Return the quantization_config of compressed-tensors. `weights` and `targets`: of each group."""
    defaults = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}
    groups = {
        f"group_{i}": {"targets": t, "weights": defaults | w, "input_activations": None}
        for i, (t, w) in enumerate(zip(targets, weights, strict=True))
    }
    ignore = {"ignore": ["lm_head"], "kv_cache_scheme": None, "quantization_status": "compressed"}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": groups} | ignore


INT4 = {"num_bits": 4, "strategy": "group", "group_size": GROUP}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}
METHODS: dict[str, tuple[Callable[[Maker], Made], dict[str, Any]]] = {
    "fp8, blocks": (
        fp8_blocks,
        {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)},
    ),
    "fp8, one scale": (fp8_tensor, {"quant_method": "fp8", "activation_scheme": "static"}),
    "fp8, rows": (fp8_rows, {"quant_method": "fp8", "weight_block_size": None}),
    "compressed, float8 rows": (fp8_rows, compressed("float-quantized", {"type": "float", "strategy": "channel"})),
    "compressed, int8": (int8_tensor, compressed("naive-quantized", {"strategy": "tensor"})),
    "compressed, int8 rows with zero points": (
        int8_rows_with_zeros,
        compressed("int-quantized", {"strategy": "channel", "symmetric": False}),
    ),
    "compressed, int4 groups": (lambda m: _packed(m, 4, m.width // GROUP), compressed("pack-quantized", INT4)),
    "compressed, int4 groups with zero points": (
        lambda m: _packed(m, 4, m.width // GROUP, zeros=True),
        compressed("pack-quantized", INT4 | {"symmetric": False}),
    ),
    "compressed, int4 groups in any order": (
        lambda m: _packed(m, 4, m.width // GROUP, index=True),
        compressed("pack-quantized", INT4 | {"actorder": "group"}),
    ),
    "compressed, int4 groups whose order was never set": (
        lambda m: _with(_packed(m, 4, m.width // GROUP), "weight_g_idx", torch.full((m.width,), -1)),
        compressed("pack-quantized", INT4 | {"actorder": "group"}),
    ),
    "compressed, packed int8 rows": (
        lambda m: _packed(m, 8, 1, zeros=True),
        compressed("pack-quantized", {"strategy": "channel", "symmetric": False}),
    ),
    "gptq": (lambda m: _gptq(m, 4, m.width // GROUP, 1), GPTQ),
    "gptq, in any order": (lambda m: _gptq(m, 4, m.width // GROUP, 1, ordered=False), GPTQ | {"desc_act": True}),
    "gptq, 8 bits, one group": (lambda m: _gptq(m, 8, 1, 1, index=False), GPTQ | {"bits": 8, "group_size": -1}),
    "gptq_v2": (lambda m: _gptq(m, 4, m.width // GROUP, 0), GPTQ | {"checkpoint_format": "gptq_v2"}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}),
}
"""Maker of a matrix, and quantization_config, by name."""


def quantise(plain: Path, directory: Path, method: str, seed: int = 0) -> Path:
    """Write a quantised model to `directory`, and replace the matrices of the model `plain` by what they mean."""
    make, config = METHODS[method]
    rng = np.random.default_rng(seed)
    quantised: Stored = {}
    meant = load_file(plain / "model.safetensors")
    for name, tensor in list(meant.items()):
        module, _, kind = name.rpartition(".")
        if kind != "weight" or not module.endswith(("_proj", ".w1", ".w2", ".w3")):
            quantised[name] = tensor
            continue
        stored, values = make(Maker(rng, *tensor.shape))
        meant[name] = values.float().contiguous()
        new = {f"{module}.{part}": value for part, value in stored.items()}
        quantised |= {n: value for n, value in new.items() if n not in meant or n == name}
    directory.mkdir(parents=True, exist_ok=True)
    for file in plain.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    save_file(meant, plain / "model.safetensors", metadata={"format": "pt"})
    save_file(quantised, directory / "model.safetensors", metadata={"format": "pt"})
    edited = json.loads((directory / "config.json").read_text()) | {"quantization_config": config}
    (directory / "config.json").write_text(json.dumps(edited))
    return directory
