"""Quantised checkpoints, one file for each method: how they are stored, and the values that they mean.

docs/models.md says what is supported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from daemon.models.architecture import ModelConfig
from daemon.models.config_values import RawConfig
from daemon.models.files import ModelError
from daemon.models.quantised.awq import read_awq
from daemon.models.quantised.compressed_tensors import read_compressed_tensors
from daemon.models.quantised.fp8 import read_fp8
from daemon.models.quantised.gptq import read_gptq
from daemon.models.quantised.matrix import Matrix as Matrix
from daemon.models.quantised.matrix import Parts, Scheme
from daemon.models.safetensors_file import Tensor

METHODS: dict[str, Callable[[RawConfig], Scheme]] = {
    "fp8": read_fp8,
    "compressed-tensors": read_compressed_tensors,
    "gptq": read_gptq,
    "awq": read_awq,
}


def read_scheme(config: ModelConfig) -> Scheme | None:
    """Return how the checkpoint is quantised; None if it is not. Raises ModelError for what cannot be dequantised."""
    raw = config.quantisation
    if not raw:
        return None
    at = f"{config.path}/config.json: quantization_config"
    method = str(raw.get("quant_method"))
    if method not in METHODS:
        raise ModelError(
            f"{at}: quant_method {method!r} is not supported; supported are {', '.join(METHODS)}; use the bf16 "
            "weights of the model, or a .gguf file"
        )
    try:
        return METHODS[method](raw)
    except ModelError as e:
        raise ModelError(f"{at}: {e}") from None


def find_matrices(scheme: Scheme, stored: Mapping[str, Tensor]) -> tuple[dict[str, Matrix], dict[str, Tensor]]:
    """Return the quantised matrices of a checkpoint by the names of the plain tensors that they replace, and the
    tensors that are not parts of one. Raises ModelError."""
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in stored.items():
        module, _, part = name.rpartition(".")
        if part in scheme.parts:
            modules.setdefault(module, {})[part] = tensor
    quantised = {module: parts for module, parts in modules.items() if not parts.keys().isdisjoint(scheme.marks)}
    used = {f"{module}.{part}" for module, parts in quantised.items() for part in parts}
    plain = {n: t for n, t in stored.items() if n not in used and n.rpartition(".")[2] not in scheme.ignored}
    matrices = {f"{module}.weight": scheme.matrix(Parts(module, parts)) for module, parts in quantised.items()}
    return matrices, plain
