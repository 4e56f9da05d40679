"""Python imports this by itself at its start: the simulation comes into a process with PyTorch and tvm-ffi."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

WITH = {"torch": "tools.simgpu.device", "tvm_ffi": "tools.simgpu.natives"}


class Finder(MetaPathFinder):
    """Finds what everyone finds, and has `install` called behind it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in WITH:
            return None
        sys.meta_path.remove(self)
        try:
            spec = find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                __import__(WITH[name], fromlist=["install"]).install()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if os.environ.get("SIMGPU"):
    sys.meta_path.insert(0, Finder())
