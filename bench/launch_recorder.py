"""Records what a step launches on the simulated CUDA runtime, call by call: kernels, copies, fills, graphs.

A call is an operation of PyTorch or a function of a compiled module. The runtime tells each launch at once, so each
belongs to the call that is running. What a graph captured counts at each of its replays.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.launch_costs import Call, Launch, Operand

_NOTE = ctypes.CFUNCTYPE(None, ctypes.c_char_p)
OTHER = "other"  # the name of calls that are neither operations nor functions of modules


class Step(NamedTuple):
    """The calls of a step that launched something, in order, and the number of graphs that it replayed."""

    calls: list[Call]
    replays: int


class Recorder(TorchDispatchMode):
    """Context manager that records. Enter it before FlashInfer loads a module and before a graph is captured.

    `dry`: without a CUDA runtime; then each operation counts as the launch of one kernel. Raises RuntimeError if the
    runtime is not the simulated one.
    """

    def __init__(self, *, dry: bool = False) -> None:
        super().__init__()
        self._dry = dry
        self._calls: list[Call] = []
        self._replays = 0
        self._launches: list[Launch] = []  # of the call that is running
        self._graphs: dict[str, list[Call]] = {}
        self._outside: list[Call] | None = None  # the calls before the capture that is going on
        self._listener = _NOTE(self._on_note)
        if not dry:
            _runtime().sim_on_note(self._listener)
            self._wrap_modules()

    def take(self) -> Step:
        """Return what was recorded since the last time."""
        self._end_call(OTHER, (), ())
        step = Step(self._calls, self._replays)
        self._calls, self._replays = [], 0
        return step

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._end_call(OTHER, (), ())
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.replace("::", ".")
        if self._dry:
            self._launches.append(Launch("kernel", name, 0))
        self._end_call(name, _operands((args, kwargs)), _operands(result))
        return result

    def _wrap_modules(self) -> None:
        import tvm_ffi

        load = tvm_ffi.load_module

        def load_module(*args: Any, **kwargs: Any) -> Any:
            return _Module(load(*args, **kwargs), self)

        tvm_ffi.load_module = load_module

    def call(self, name: str, function: Any, args: Sequence[Any]) -> Any:
        """Call a function of a compiled module."""
        self._end_call(OTHER, (), ())
        result = function(*args)
        self._end_call(name, _operands(args), ())
        return result

    def _end_call(self, name: str, operands: tuple[Operand, ...], results: tuple[Operand, ...]) -> None:
        if self._launches:
            captured = self._outside is not None
            self._calls.append(Call(name, operands, results, tuple(self._launches), captured))
            self._launches = []

    def _on_note(self, line: bytes) -> None:
        kind, _, rest = line.decode().strip().partition(" ")
        first = rest.partition(" ")[0]
        if kind == "launch":
            self._launches.append(Launch("kernel", first, 0))
        elif kind in ("copy", "fill"):
            self._launches.append(Launch(kind, "", int(first)))
        elif kind == "replay":
            self._end_call(OTHER, (), ())
            self._calls += self._graphs[rest.split()[1]]
            self._replays += 1
        elif kind == "capture":
            self._end_call(OTHER, (), ())
            self._on_capture(*re.fullmatch(r"of (\S+) (begins|ends)", rest).groups())  # type: ignore[union-attr]

    def _on_capture(self, graph: str, what: str) -> None:
        if what == "begins":
            self._outside, self._calls = self._calls, []
        elif self._outside is not None:
            self._graphs[graph], self._calls, self._outside = self._calls, self._outside, None


class _Module:
    """A compiled module whose calls are recorded."""

    def __init__(self, module: Any, recorder: Recorder) -> None:
        self._module = module
        self._recorder = recorder

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._module, name)
        return lambda *args: self._recorder.call(name, function, args)


def _runtime() -> ctypes.CDLL:
    try:
        runtime = ctypes.CDLL("libcudart.so.13")
        runtime.sim_on_note  # noqa: B018
    except (OSError, AttributeError):
        raise RuntimeError("this needs the simulated GPU: python -m tools.simgpu --launch-only -m ...") from None
    return runtime


def _operands(tree: Any) -> tuple[Operand, ...]:
    return tuple(
        Operand(tuple(t.shape), t.itemsize, t.data_ptr()) for t in tree_leaves(tree) if isinstance(t, torch.Tensor)
    )
