"""Python imports this by itself at its start: the simulation comes into a process with PyTorch and tvm-ffi."""

import os
import sys
from importlib.abc import MetaPathFinder
from importlib.util import find_spec

WITH = {"torch": "tests.simgpu.device", "tvm_ffi": "tests.simgpu.natives"}


class Finder(MetaPathFinder):
    """Finds what everyone finds, and has `install` called behind it."""

    def find_spec(self, name, path=None, target=None):
        if name not in WITH:
            return None
        sys.meta_path.remove(self)
        try:
            spec = find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                __import__(WITH[name], fromlist=["install"]).install()

            spec.loader.exec_module = exec_module
        return spec


if os.environ.get("SIMGPU"):
    sys.meta_path.insert(0, Finder())
