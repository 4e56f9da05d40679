"""Compiled CPU kernels: one decorator, one place for what is compiled to be kept.

Import `kernel` from here and never numba itself before this module: numba reads its cache
directory once, when it is imported.

Machine code holds what a kernel calls and the constants it uses, from whatever file, while numba looks only at the
kernel's own file to see whether it is current. So it is kept under a stamp of every file with a kernel in it.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from daemon.config import cache_dir


def _stamp() -> str:
    """Changes with every file below this folder that compiles kernels; 12 hex digits."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        source = file.read_bytes()
        if b"daemon.engine.jit" in source:
            digest.update(source)
    return digest.hexdigest()[:12]


os.environ.setdefault("NUMBA_CACHE_DIR", str(cache_dir() / "numba" / _stamp()))

import numba  # noqa: E402

# What a scalar in a kernel is to the compiler; a type checker cannot follow compiled arithmetic.
F32: TypeAlias = Any
F64: TypeAlias = Any
I32: TypeAlias = Any
I64: TypeAlias = Any
U32: TypeAlias = Any
U64: TypeAlias = Any

F = TypeVar("F", bound=Callable[..., Any])


def _is_writable(directory: Path) -> bool:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(directory, os.W_OK | os.X_OK)


# Without a place to keep machine code, numba refuses to cache rather than compile.
_CACHE = _is_writable(Path(os.environ["NUMBA_CACHE_DIR"]))
if not any(Path(os.environ["NUMBA_CACHE_DIR"]).rglob("*.nbi")):
    # A start that takes many times as long as others should say why.
    _kept = "once for this version" if _CACHE else f"and cannot keep them in {os.environ['NUMBA_CACHE_DIR']}"
    logging.getLogger(__name__).info("compiling kernels for this CPU, %s: some seconds, more if it is busy", _kept)


def kernel(
    *signatures: str, parallel: bool = False, fastmath: bool = False, inline: bool = False
) -> Callable[[F], F]:
    """Compile a function with numba, release the GIL in it and keep the machine code on disk where there is room.

    With `signatures` (such as ``"int64(float32[::1], uint64)"``) it compiles when its module is imported, from
    the disk cache where that is current; without any, at the first call with new argument types.
    `fastmath` lets the compiler reorder sums, so that bits may differ with length and alignment: leave it
    off wherever a result must not depend on its neighbours. `inline` has LLVM inline it into its callers.
    """
    options: dict[str, Any] = {"cache": _CACHE, "nogil": True, "parallel": parallel, "fastmath": fastmath}
    if inline:
        options["forceinline"] = True
    compiler: Any = numba.njit(list(signatures) or None, **options)
    return compiler


prange = numba.prange
