"""Child process of `compile.py`: makes FlashInfer write the sources and ninja files of kernels; compiles nothing.

FlashInfer reads directory, architecture and flags from the environment at its import, so this is a separate process.
Standard input: a JSON list of [name, generator, args]. Standard output: a JSON object, name -> ninja file.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

EMPTY_HEADERS = "empty"  # directory beside FlashInfer's own


def _attention(_name: str, backend: str, q: str, kv: str, head_dim: int, window: bool, cap: bool) -> Any:
    import torch
    from flashinfer.jit import gen_batch_prefill_module

    dtypes = {"bf16": torch.bfloat16, "f16": torch.float16, "e4m3": torch.float8_e4m3fn}
    no_position, fp16_reduction = 0, False
    return gen_batch_prefill_module(
        backend, dtypes[q], dtypes[kv], dtypes[q], torch.int32, head_dim, head_dim,
        no_position, window, cap, fp16_reduction,
    )  # fmt: skip


def _norm(_name: str) -> Any:
    from flashinfer.jit.norm import gen_norm_module

    spec = gen_norm_module()
    # It includes headers of cuBLAS and cuRAND, but uses nothing of them.
    spec.extra_include_dirs = [Path(os.environ["FLASHINFER_WORKSPACE_BASE"]) / EMPTY_HEADERS]
    return spec


def _own(name: str, source: str, *flags: str) -> Any:
    # gen_jit_spec would add -use_fast_math.
    from flashinfer.jit.core import JitSpec

    return JitSpec(
        name=name,
        sources=[Path(source)],
        extra_cflags=["-std=c++17", "-O3"],
        extra_cuda_cflags=list(flags),
        extra_ldflags=None,
        extra_include_dirs=None,
    )


GENERATORS: dict[str, Callable[..., Any]] = {
    "attention": _attention,
    "norm": _norm,
    "own": _own,
}


def generate(name: str, generator: str, args: list[str | int]) -> str:
    """Write the sources and the ninja file of one kernel, and return the path of the ninja file."""
    spec = GENERATORS[generator](name, *args)
    if spec.name != name:
        raise ValueError(f"this FlashInfer calls the kernel {spec.name}, not {name}")
    spec.write_ninja()
    return str(spec.ninja_path)


if __name__ == "__main__":
    answer = {name: generate(name, generator, args) for name, generator, args in json.load(sys.stdin)}
    print(json.dumps(answer))
