"""PyTorch's operations on the simulated device: launched as usual, then computed on the CPU when the stream gets
there.

Every operation on a CUDA tensor first runs unchanged: memory is allocated, arguments are checked, kernels are
launched, copies are put into streams. After its launch a call is put into the stream. It computes the same operation
with CPU tensors over the same memory, and writes the results to the places of the kernel's results. A graph that
captured the launch also captures the call.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
EXIT_FAILED = 99  # exit status after a failed computation: the exception has no caller to go to

# Operations that compute nothing.
_NO_COMPUTATION = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten.record_stream.default,
    aten.resize_.default,
    aten.is_pinned.default,
    aten._pin_memory.default,
    aten.set_.source_Storage_storage_offset,
    aten._local_scalar_dense.default,
}
_COPIES = {
    aten.copy_.default,
    aten._to_copy.default,
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
}
# Operations without a CPU kernel.
_REPLACEMENTS: dict[Any, Callable[..., Any]] = {
    aten.mm.dtype: lambda a, b, dtype: a.to(dtype) @ b.to(dtype),
    aten.mm.dtype_out: lambda a, b, dtype, out: out.copy_(a.to(dtype) @ b.to(dtype)),
}

_calls: dict[int, Callable[[], Any]] = {}
_numbers = itertools.count(1)
_runtime = ctypes.CDLL("libcudart.so.13")
_runtime.sim_call.argtypes = (ctypes.c_void_p, ctypes.c_uint64)
_runtime.sim_finish.argtypes = (ctypes.c_void_p,)


@ctypes.CFUNCTYPE(None, ctypes.c_uint64, ctypes.c_int)  # type: ignore[untyped-decorator]
def _on_call(number: int, again: int) -> None:
    try:
        compute = _calls[number] if again else _calls.pop(number)
        with torch.inference_mode(), _disable_current_modes():
            compute()
    except BaseException:
        _die(traceback.format_exc())


def _die(text: str) -> None:
    """Write to the original standard error, because tests capture the current one, and exit."""
    os.write(_runtime.sim_stderr(), f"simgpu: {text}".encode())
    os._exit(EXIT_FAILED)


def submit_computation(compute: Callable[[], Any], device: torch.device) -> None:
    """Run `compute` when the current stream of `device` gets there."""
    number = next(_numbers)
    _calls[number] = compute
    with torch.cuda.device(device):
        _runtime.sim_call(torch.cuda.current_stream().cuda_stream, number)


def _finish(device: torch.device) -> None:
    with torch.cuda.device(device):
        _runtime.sim_finish(torch.cuda.current_stream().cuda_stream)


def on_host(t: torch.Tensor) -> torch.Tensor:
    """Return a CPU tensor over the same memory, on the device or not. It does not keep the memory alive."""
    storage = t.untyped_storage()
    if not t.numel():
        return torch.empty(t.shape, dtype=t.dtype)
    memory = (ctypes.c_ubyte * storage.nbytes()).from_address(storage.data_ptr())
    flat = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=t.dtype).set_(flat, t.storage_offset(), t.size(), t.stride())


class Simulation(TorchDispatchMode):
    """Simulates the operations of one thread, until the process ends."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        arguments = _tensors((args, kwargs))
        device = kwargs.get("device")
        if not any(t.is_cuda for t in arguments) and (device is None or torch.device(device).type != "cuda"):
            return func(*args, **kwargs)
        if func is aten.equal.default:  # it reads its result, which no kernel has written
            _finish(arguments[0].device)
            return func(*map(on_host, args))
        result = func(*args, **kwargs)
        results = _tensors(result)
        if func in _NO_COMPUTATION or _is_view(func, arguments, results):
            return result
        if func in _COPIES and not all(t.is_cuda for t in (arguments[0], *arguments[1:2], *results)):
            _copy(arguments[1] if func is aten.copy_.default else arguments[0], results[0])
            return result
        compute = _computation(func, args, kwargs, results)
        if all(t.is_cuda for t in results):
            submit_computation(compute, _device_of(results + arguments))
        else:
            _finish(_device_of(arguments))
            compute()
        return result


def _device_of(tensors: list[torch.Tensor]) -> torch.device:
    return next(t.device for t in tensors if t.is_cuda)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def _is_view(func: Any, arguments: list[torch.Tensor], results: list[torch.Tensor]) -> bool:
    """Return True if the result is a view. Operations such as reshape may return a view or a copy."""
    returns = func._schema.returns
    if not returns or not results or any(r.alias_info is None or r.alias_info.is_write for r in returns):
        return False
    where = results[0].untyped_storage().data_ptr()
    return any(t.untyped_storage().data_ptr() == where for t in arguments)


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy between host and device. Without a kernel in it, the runtime has already made the copy."""
    if source.dtype == target.dtype and source.is_contiguous() and target.is_contiguous():
        return
    _finish(_device_of([source, target]))
    on_host(target).copy_(on_host(source))


def _computation(func: Any, args: Any, kwargs: Any, results: list[torch.Tensor]) -> Callable[[], None]:
    """Return the operation on CPU tensors, over the current memory of arguments and results."""
    args, kwargs = tree_map_only(torch.Tensor, lambda t: on_host(t) if t.is_cuda else t.clone(), (args, kwargs))
    named = {name: value for name, value in kwargs.items() if name != "pin_memory"}
    if named.get("device") is not None:
        named["device"] = torch.device("cpu")
    if named.get("generator") is not None:
        named["generator"] = torch.Generator().manual_seed(named["generator"].initial_seed())
    targets = [on_host(t) if t.is_cuda else t for t in results]
    compute = _REPLACEMENTS.get(func, func)

    def work() -> None:
        for target, value in zip(targets, _tensors(compute(*args, **named)), strict=True):
            if target.data_ptr() != value.data_ptr():
                target.copy_(value)

    return work


def install() -> None:
    """Start the simulation in this process, for the calling thread."""
    _runtime.sim_on_call(_on_call)
    # Attention by separate operations: its fused kernels exist only for CUDA.
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    Simulation().__enter__()
