"""Python imports this module at its start. It loads the simulation when PyTorch and tvm-ffi are imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

SIMULATIONS = {"torch": "tools.simgpu.device", "tvm_ffi": "tools.simgpu.natives"}


class Finder(MetaPathFinder):
    """Finds modules as usual, and calls the simulation's `install` after PyTorch or tvm-ffi is loaded."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in SIMULATIONS:
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
                __import__(SIMULATIONS[name], fromlist=["install"]).install()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if os.environ.get("SIMGPU"):
    sys.meta_path.insert(0, Finder())
