"""The CUDA runtime calls that KV copies between processes need, by ctypes: one method per call.

A process has one context per device, whichever copy of the runtime library uses it, so pointers that torch allocated
are valid here. `CudaRuntime` still prefers the copy of the library that torch uses, because streams and errors belong
to one copy.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_void_p
from pathlib import Path
from typing import Any, NamedTuple

HANDLE_BYTES = 64

_NAMES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so")
_DRIVER = "libcuda.so.1"

_SUCCESS = 0
_NOT_READY = 600
_LAZY_PEER_ACCESS = 1  # cudaIpcMemLazyEnablePeerAccess
_NON_BLOCKING = 1  # cudaStreamNonBlocking: not ordered with the legacy default stream
_BLOCKING_SYNC = 1  # cudaEventBlockingSync: a waiting thread blocks and does not spin
_NO_TIMING = 2  # cudaEventDisableTiming
_IN_STREAM_ORDER = 1  # cudaMemcpySrcAccessOrderStream
_BATCH_VERSION = 13000  # of the runtime; cudaMemcpyBatchAsync has other arguments in 12.8
_BATCH_UNKNOWN = (36, 801)  # the driver is older than the runtime; not supported
_BY_ADDRESS = 4  # cudaMemcpyDefault: the addresses tell host and device memory apart


class CudaError(RuntimeError):
    """A failed call; `code` is its cudaError_t (for calls of the driver: its CUresult)."""

    def __init__(self, call: str, code: int, text: str) -> None:
        super().__init__(f"{call}: {text} ({code})")
        self.code = code


class Allocation(NamedTuple):
    """The memory of one cudaMalloc."""

    base: int
    nbytes: int


class Copy(NamedTuple):
    """One copy between two addresses."""

    destination: int
    source: int
    nbytes: int


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", c_ubyte * HANDLE_BYTES),)


class _CopyAttributes(ctypes.Structure):
    """cudaMemcpyAttributes. Its hints of locations are for managed memory only."""

    _fields_ = (("source_order", c_int), ("hints", c_int * 4), ("flags", c_uint))


_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cudaSetDevice": (c_int,),
    "cudaDeviceGetPCIBusId": (c_char_p, c_int, c_int),
    "cudaDeviceGetStreamPriorityRange": (POINTER(c_int), POINTER(c_int)),
    "cudaIpcGetMemHandle": (POINTER(_Handle), c_void_p),
    "cudaIpcOpenMemHandle": (POINTER(c_void_p), _Handle, c_uint),
    "cudaIpcCloseMemHandle": (c_void_p,),
    "cudaStreamCreateWithPriority": (POINTER(c_void_p), c_uint, c_int),
    "cudaStreamSynchronize": (c_void_p,),
    "cudaStreamDestroy": (c_void_p,),
    "cudaMemcpyAsync": (c_void_p, c_void_p, c_size_t, c_int, c_void_p),
    "cudaEventCreateWithFlags": (POINTER(c_void_p), c_uint),
    "cudaEventRecord": (c_void_p, c_void_p),
    "cudaEventQuery": (c_void_p,),
    "cudaEventSynchronize": (c_void_p,),
    "cudaEventDestroy": (c_void_p,),
    "cudaGetLastError": (),
    "cudaRuntimeGetVersion": (POINTER(c_int),),
}
_BATCH = "cudaMemcpyBatchAsync"
_BATCH_SIGNATURE = (
    POINTER(c_void_p), POINTER(c_void_p), POINTER(c_size_t), c_size_t,
    POINTER(_CopyAttributes), POINTER(c_size_t), c_size_t, c_void_p,
)  # fmt: skip


class CudaRuntime:
    """The runtime library. Every method raises CudaError; streams, events and pointers are plain integers.

    `library`: path or name of libcudart. By default the one that this process has already mapped, such as torch's
    own, otherwise the one that the loader finds. Raises OSError if there is none.
    """

    def __init__(self, library: str = "", driver: str = _DRIVER) -> None:
        self._lib = ctypes.CDLL(library) if library else load_library("libcudart", _NAMES)
        self._driver = driver
        for name, arguments in _SIGNATURES.items():
            self._declare(name, arguments)
        self._batches = self._version() >= _BATCH_VERSION and hasattr(self._lib, _BATCH)
        if self._batches:
            self._declare(_BATCH, _BATCH_SIGNATURE)
        self._lib.cudaGetErrorString.argtypes = (c_int,)
        self._lib.cudaGetErrorString.restype = c_char_p

    # -- devices

    def set_device(self, device: int) -> None:
        """Select the device of the calling thread."""
        self._call("cudaSetDevice", device)

    def pci_address(self, device: int) -> str:
        """Return the PCI address of the device, such as "0000:1B:00.0"; it is the same in every process."""
        address = ctypes.create_string_buffer(32)
        self._call("cudaDeviceGetPCIBusId", address, len(address), device)
        return address.value.decode()

    # -- memory of other processes

    def ipc_handle(self, pointer: int) -> bytes:
        """Return the HANDLE_BYTES by which other processes open the whole allocation that contains `pointer`."""
        handle = _Handle()
        self._call("cudaIpcGetMemHandle", byref(handle), pointer)
        return bytes(handle.reserved)

    def open_ipc(self, handle: bytes) -> int:
        """Map an allocation of another process for the current device and return its base address.

        This also enables access between the two devices. Raises ValueError if `handle` is not HANDLE_BYTES long.
        """
        if len(handle) != HANDLE_BYTES:
            raise ValueError(f"an IPC handle has {HANDLE_BYTES} bytes, not {len(handle)}")
        pointer = c_void_p()
        self._call("cudaIpcOpenMemHandle", byref(pointer), _Handle.from_buffer_copy(handle), _LAZY_PEER_ACCESS)
        return pointer.value or 0

    def close_ipc(self, pointer: int) -> None:
        """Unmap an allocation; `pointer`: the result of `open_ipc`."""
        self._call("cudaIpcCloseMemHandle", pointer)

    def allocation(self, pointer: int) -> Allocation:
        """Return the allocation that contains `pointer`. Raises OSError without a driver."""
        driver = ctypes.CDLL(self._driver)
        base, nbytes = c_uint64(), c_size_t()
        # A call of the driver: the runtime has no equivalent.
        code = driver.cuMemGetAddressRange_v2(byref(base), byref(nbytes), c_uint64(pointer))
        if code != _SUCCESS:
            raise CudaError("cuMemGetAddressRange", code, "not a pointer to device memory")
        return Allocation(base.value, nbytes.value)

    # -- streams

    def create_stream(self) -> int:
        """Create a stream of the lowest priority that is not ordered with any other stream."""
        least, greatest, stream = c_int(), c_int(), c_void_p()
        self._call("cudaDeviceGetStreamPriorityRange", byref(least), byref(greatest))
        self._call("cudaStreamCreateWithPriority", byref(stream), _NON_BLOCKING, least.value)
        return stream.value or 0

    def synchronize_stream(self, stream: int) -> None:
        """Wait for all work on the stream."""
        self._call("cudaStreamSynchronize", stream)

    def destroy_stream(self, stream: int) -> None:
        self._call("cudaStreamDestroy", stream)

    def copy(self, destination: int, source: int, nbytes: int, stream: int) -> None:
        """Start a copy between any two addresses, host memory included. Both must stay valid until it has ended."""
        self._call("cudaMemcpyAsync", destination, source, nbytes, _BY_ADDRESS, stream)

    def copy_all(self, copies: Sequence[Copy], stream: int) -> None:
        """Start copies between device memory, in one call if runtime and driver can. See `copy`.

        One call for 512 blocks of 2 MiB copies 410 GB/s within an H200, a call for each block 318. Copies of one call
        may run in any order. After a CudaError some of them may be on the stream.
        """
        if len(copies) > 1 and self._batches:
            try:
                return self._copy_batch(copies, stream)
            except CudaError as e:
                if e.code not in _BATCH_UNKNOWN:
                    raise
                self._batches = False
        for copy in copies:
            self.copy(*copy, stream)

    def _copy_batch(self, copies: Sequence[Copy], stream: int) -> None:
        count = len(copies)
        destinations, sources, sizes = zip(*copies, strict=True)
        attributes = _CopyAttributes(source_order=_IN_STREAM_ORDER)
        self._call(
            _BATCH,
            (c_void_p * count)(*destinations),
            (c_void_p * count)(*sources),
            (c_size_t * count)(*sizes),
            count,
            byref(attributes),
            byref(c_size_t(0)),  # the attributes hold from the first copy on
            1,
            stream,
        )

    # -- events

    def create_event(self) -> int:
        """Create an event without a timestamp; a thread that waits for it blocks and does not spin."""
        event = c_void_p()
        self._call("cudaEventCreateWithFlags", byref(event), _BLOCKING_SYNC | _NO_TIMING)
        return event.value or 0

    def record(self, event: int, stream: int) -> None:
        """Record `event` on `stream`, behind all its work so far."""
        self._call("cudaEventRecord", event, stream)

    def is_done(self, event: int) -> bool:
        """Return True if the work before `event` is done."""
        return self._call("cudaEventQuery", event) == _SUCCESS

    def synchronize_event(self, event: int) -> None:
        """Wait until the work before `event` is done, without the interpreter lock."""
        self._call("cudaEventSynchronize", event)

    def destroy_event(self, event: int) -> None:
        self._call("cudaEventDestroy", event)

    def _declare(self, name: str, arguments: tuple[Any, ...]) -> None:
        function = getattr(self._lib, name)
        function.argtypes = arguments
        function.restype = c_int

    def _version(self) -> int:
        version = c_int()
        self._call("cudaRuntimeGetVersion", byref(version))
        return version.value

    def _call(self, name: str, *arguments: Any) -> int:
        code: int = getattr(self._lib, name)(*arguments)
        if code == _SUCCESS:
            return code
        # The library keeps the error for this thread. Clear it, or the next caller of cudaGetLastError, such as torch
        # after a launch, would take it for its own.
        self._lib.cudaGetLastError()
        if code == _NOT_READY:
            return code
        raise CudaError(name, code, self._lib.cudaGetErrorString(code).decode(errors="replace"))


def load_library(stem: str, names: Sequence[str]) -> ctypes.CDLL:
    """Load the library whose file name begins with `stem` and that this process has mapped, else one of `names`.

    Raises OSError if there is none.
    """
    for name in (*_mapped(stem), *names):
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    raise OSError(f"cannot find {stem}: none of {', '.join(names)}")


def _mapped(stem: str) -> list[str]:
    """Return the paths of the libraries with this stem that this process has mapped."""
    fields = (line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines())
    paths = {entry[5] for entry in fields if len(entry) == 6}
    return sorted(path for path in paths if Path(path).name.startswith(stem))
