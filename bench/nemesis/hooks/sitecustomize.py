"""Python imports this first if its folder is in PYTHONPATH: processes of the daemon die or stop at armed steps.

Only the nemesis puts it there. See `bench.nemesis.steps`.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import mmap
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from bench.nemesis.steps import ARMED, HIT, NUMBERS, STEPS

_folder = Path(os.environ["NEMESIS_STEPS"])
with open(_folder / ARMED, "rb") as _file:
    _armed = mmap.mmap(_file.fileno(), 0, access=mmap.ACCESS_READ)


def _act(number: int) -> None:
    """Die or stop here, unless another process was first."""
    order = _folder / str(number)
    try:
        what = order.read_text()
        order.unlink()
    except FileNotFoundError:
        return
    (_folder / f"{number}{HIT}").write_text(f"{os.getpid()} {time.monotonic()}")
    os.kill(os.getpid(), signal.SIGKILL if what == "kill" else signal.SIGSTOP)


def _passes(number: int | None, result: Any = True, *, if_true: bool = False) -> None:
    if number is not None and _armed[number] and (result or not if_true):
        _act(number)


def _wrap(function: Callable[..., Any], before: int | None, after: int | None, if_true: bool) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def wait(*args: Any, **fields: Any) -> Any:
            _passes(before)
            result = await function(*args, **fields)
            _passes(after, result, if_true=if_true)
            return result

        return wait

    @functools.wraps(function)
    def call(*args: Any, **fields: Any) -> Any:
        _passes(before)
        result = function(*args, **fields)
        _passes(after, result, if_true=if_true)
        return result

    return call


def _patch(module: ModuleType) -> None:
    by_function: dict[str, list[str]] = {}
    for name, step in STEPS.items():
        if step.module == module.__name__:
            by_function.setdefault(step.function, []).append(name)
    for path, names in by_function.items():
        owner_name, name = path.split(".")
        owner = getattr(module, owner_name)
        before = next((NUMBERS[n] for n in names if not STEPS[n].after), None)
        after = next((NUMBERS[n] for n in names if STEPS[n].after), None)
        setattr(owner, name, _wrap(getattr(owner, name), before, after, any(STEPS[n].if_true for n in names)))


class _Loader(importlib.abc.Loader):
    """Runs a module as its own loader does, then wraps its functions."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _patch(module)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self) -> None:
        self._modules = {step.module for step in STEPS.values()}

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in self._modules:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


sys.meta_path.insert(0, _Finder())
