"""Compiled CPU kernels: the decorator and the cache directory of their machine code.

Import `kernel` from here, and do not import numba before this module: numba reads its cache directory once, at
import.

The machine code of a kernel contains the functions that it calls and the constants that it uses, also those from
other files. But numba checks only the kernel's own file to decide if the cached code is current. So the name of the
cache directory contains a hash of every file that has a kernel.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from daemon.directories import cache_dir


def _stamp() -> str:
    """Return a hash (12 hex digits) of every file below this folder that compiles kernels."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        source = file.read_bytes()
        if b"daemon.engine.jit" in source:
            digest.update(source)
    return digest.hexdigest()[:12]


os.environ.setdefault("NUMBA_CACHE_DIR", str(cache_dir() / "numba" / _stamp()))

import numba  # noqa: E402

# Types of scalars in kernels, for the reader: a type checker cannot follow compiled arithmetic.
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


# With `cache=True` and no writable directory numba raises an error instead of compiling.
_DIRECTORY = Path(os.environ["NUMBA_CACHE_DIR"])
_CACHE = _is_writable(_DIRECTORY)
_NOTE = "compiling kernels for %s (%s): takes some seconds, more on a busy CPU"
_log = logging.getLogger(__name__)
_is_first = not any(_DIRECTORY.rglob("*.nbi"))
if _is_first:
    # The first start takes many times as long as the next ones: log the reason.
    _log.info(_NOTE, "this CPU", "once for this version" if _CACHE else f"cannot cache them in {_DIRECTORY}")


def log_first_use(what: str, key: object) -> None:
    """Log that kernels are compiled, if none with this `key` were used before: such a start takes longer, too."""
    if not _CACHE:
        return
    marker = _DIRECTORY / "used" / hashlib.sha256(repr(key).encode()).hexdigest()[:12]
    if not marker.exists():
        if not _is_first:
            _log.info(_NOTE, what, "once")
        with suppress(OSError):
            marker.parent.mkdir(exist_ok=True)
            marker.touch()


def kernel(
    *signatures: str, parallel: bool = False, fastmath: bool = False, inline: bool = False
) -> Callable[[F], F]:
    """Compile a function with numba. It releases the GIL; its machine code is cached on disk if that is writable.

    With `signatures` (such as ``"int64(float32[::1], uint64)"``) the function is compiled when its module is
    imported, or read from the disk cache if that is current. Without signatures it is compiled at the first call with
    new argument types. `fastmath` lets the compiler reorder sums, so bits may differ with length and alignment:
    leave it off if a result must not depend on its neighbours. `inline` makes LLVM inline it into its callers.

    Division follows IEEE 754: by zero it gives an infinity or NaN, for one row. Python's rule would raise
    ZeroDivisionError and lose all rows of the step.
    """
    options: dict[str, Any] = {"cache": _CACHE, "nogil": True, "parallel": parallel, "fastmath": fastmath}
    options["error_model"] = "numpy"
    if inline:
        options["forceinline"] = True
    compiler: Any = numba.njit(list(signatures) or None, **options)
    return compiler


prange = numba.prange
