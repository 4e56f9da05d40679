"""The simulated CUDA runtime, called through ctypes: it delays work as far as allowed, and refuses what a GPU
refuses."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_int, c_size_t, c_uint, c_void_p

import pytest

from tools.simgpu.build import CUDART, RUNTIME, BuildError, compile_library

OUT_OF_MEMORY, INVALID_VALUE, INVALID_CONFIGURATION, UNKNOWN_KERNEL = 2, 1, 9, 98
INVALID_DEVICE, INVALID_HANDLE = 101, 400
NOT_READY, UNCAPTURABLE, IMPLICIT = 600, 900, 906
GLOBAL, DEFAULT = 0, 4  # kinds of capture, of copy
SIZE = 64


class Dim3(ctypes.Structure):
    _fields_ = (("x", c_uint), ("y", c_uint), ("z", c_uint))


@pytest.fixture(scope="module")
def cuda(tmp_path_factory):
    try:
        library = compile_library(tmp_path_factory.mktemp("simgpu"), CUDART, [RUNTIME.read_text()])
    except BuildError as e:
        pytest.skip(f"no CUDA toolkit to compile it with: {e}")
    loaded = ctypes.CDLL(str(library))
    loaded.cudaMemcpyAsync.argtypes = (c_void_p, c_void_p, c_size_t, c_int, c_void_p)
    loaded.cudaLaunchKernel.argtypes = (c_void_p, Dim3, Dim3, c_void_p, c_size_t, c_void_p)
    loaded.cudaFuncSetAttribute.argtypes = (c_void_p, c_int, c_int)
    return loaded


@pytest.fixture
def stream(cuda):
    return made(cuda.cudaStreamCreate)


def made(create, *arguments):
    handle = c_void_p()
    assert create(byref(handle), *arguments) == 0
    return handle


def device(cuda):
    return made(cuda.cudaMalloc, c_size_t(SIZE))


def pinned(cuda, byte):
    memory = made(cuda.cudaHostAlloc, c_size_t(SIZE), c_uint(0))
    ctypes.memset(memory, byte, SIZE)
    return memory


def read(memory):
    return ctypes.string_at(memory, SIZE)


def copy(cuda, to, source, stream):
    return cuda.cudaMemcpyAsync(to, source, SIZE, DEFAULT, stream)


def test_new_memory_is_nan(cuda):
    assert read(device(cuda)) == b"\xff" * SIZE


def test_a_copy_is_made_when_a_call_waits_for_it(cuda, stream):
    """So if a host buffer is filled again too early, the new content is copied."""
    source, target = pinned(cuda, 1), device(cuda)
    assert copy(cuda, target, source, stream) == 0
    assert read(target) == b"\xff" * SIZE
    ctypes.memset(source, 2, SIZE)
    assert cuda.cudaStreamSynchronize(stream) == 0
    assert read(target) == b"\x02" * SIZE


def test_pageable_memory_is_read_at_once(cuda, stream):
    source, target = ctypes.create_string_buffer(b"\x03" * SIZE, SIZE), device(cuda)
    copy(cuda, target, source, stream)
    ctypes.memset(source, 4, SIZE)
    cuda.cudaStreamSynchronize(stream)
    assert read(target) == b"\x03" * SIZE


def test_streams_are_independent_without_an_event(cuda):
    one, other = made(cuda.cudaStreamCreate), made(cuda.cudaStreamCreate)
    source, middle, target = pinned(cuda, 5), device(cuda), device(cuda)
    copy(cuda, middle, source, one)
    copy(cuda, target, middle, other)
    cuda.cudaStreamSynchronize(other)
    assert read(target) == b"\xff" * SIZE
    event = made(cuda.cudaEventCreate)
    cuda.cudaEventRecord(event, one)
    cuda.cudaStreamWaitEvent(other, event, 0)
    copy(cuda, target, middle, other)
    cuda.cudaStreamSynchronize(other)
    assert read(target) == b"\x05" * SIZE


def test_an_event_that_is_queried_completes_late(cuda, stream):
    source, target, event = pinned(cuda, 6), device(cuda), made(cuda.cudaEventCreate)
    for _ in range(100):
        copy(cuda, target, source, stream)
    cuda.cudaEventRecord(event, stream)
    answers = [cuda.cudaEventQuery(event)]
    while answers[-1] == NOT_READY:
        answers.append(cuda.cudaEventQuery(event))
    assert len(answers) > 2
    assert answers[-1] == 0
    cuda.cudaGetLastError()


def test_each_launch_of_a_graph_repeats_the_captured_work(cuda, stream):
    source, target, graph, executable = pinned(cuda, 7), device(cuda), c_void_p(), c_void_p()
    assert cuda.cudaStreamBeginCapture(stream, GLOBAL) == 0
    assert copy(cuda, target, source, stream) == 0
    assert cuda.cudaStreamEndCapture(stream, byref(graph)) == 0
    cuda.cudaStreamSynchronize(stream)
    assert read(target) == b"\xff" * SIZE
    assert cuda.cudaGraphInstantiateWithFlags(byref(executable), graph, ctypes.c_ulonglong(0)) == 0
    for byte in (7, 8):
        ctypes.memset(source, byte, SIZE)
        cuda.cudaGraphLaunch(executable, stream)
        cuda.cudaStreamSynchronize(stream)
        assert read(target) == bytes([byte]) * SIZE


def test_calls_that_may_not_be_captured_are_refused(cuda, stream):
    other, graph, event = made(cuda.cudaStreamCreate), c_void_p(), made(cuda.cudaEventCreate)
    source, target, kernel = pinned(cuda, 9), device(cuda), register(cuda, 1, b"some_kernel")
    cuda.cudaEventRecord(event, other)
    cuda.cudaStreamBeginCapture(stream, GLOBAL)
    try:
        assert cuda.cudaMalloc(byref(c_void_p()), c_size_t(1)) == UNCAPTURABLE
        assert cuda.cudaDeviceSynchronize() == UNCAPTURABLE
        assert cuda.cudaEventQuery(event) == UNCAPTURABLE
        assert cuda.cudaStreamSynchronize(stream) == UNCAPTURABLE
        assert copy(cuda, target, source, None) == IMPLICIT
        assert launch(cuda, kernel) == IMPLICIT
        assert copy(cuda, target, ctypes.create_string_buffer(SIZE), stream) == UNCAPTURABLE
        assert copy(cuda, target, source, other) == 0
    finally:
        cuda.cudaStreamEndCapture(stream, byref(graph))


def register(cuda, address, name):
    """Register a kernel, as the host code that nvcc generates does."""
    function = c_void_p(address << 12)
    cuda.__getattr__("__cudaRegisterFunction")(None, function, None, name)
    return function


def launch(cuda, kernel, *, grid=(1, 1, 1), block=(32, 1, 1), shared=0):
    return cuda.cudaLaunchKernel(kernel, Dim3(*grid), Dim3(*block), None, shared, None)


def test_launches_that_every_gpu_refuses_are_refused(cuda):
    kernel = register(cuda, 2, b"another_kernel")
    assert launch(cuda, c_void_p(1 << 40)) == UNKNOWN_KERNEL
    assert launch(cuda, kernel) == 0
    assert launch(cuda, kernel, grid=(0, 1, 1)) == INVALID_CONFIGURATION
    assert launch(cuda, kernel, grid=(1, 65536, 1)) == INVALID_CONFIGURATION
    assert launch(cuda, kernel, block=(33, 32, 1)) == INVALID_CONFIGURATION
    assert launch(cuda, kernel, shared=48 << 10) == 0
    assert launch(cuda, kernel, shared=64 << 10) == INVALID_VALUE
    most_dynamic_shared_memory = 8
    assert cuda.cudaFuncSetAttribute(kernel, most_dynamic_shared_memory, 228 << 10) == INVALID_VALUE
    assert cuda.cudaFuncSetAttribute(kernel, most_dynamic_shared_memory, 64 << 10) == 0
    assert launch(cuda, kernel, shared=64 << 10) == 0


def test_a_listener_hears_each_launch_copy_and_fill_and_what_a_graph_captures(cuda, stream):
    heard, graph = [], c_void_p()
    listener = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(lambda line: heard.append(line.decode().split()))
    source, target, kernel = pinned(cuda, 1), device(cuda), register(cuda, 3, b"heard_kernel")
    cuda.sim_on_note(listener)
    try:
        assert launch(cuda, kernel) == 0
        cuda.cudaStreamBeginCapture(stream, GLOBAL)
        copy(cuda, target, source, stream)
        cuda.cudaMemsetAsync(target, 0, c_size_t(SIZE), stream)
        cuda.cudaStreamEndCapture(stream, byref(graph))
        cuda.cudaGraphLaunch(graph, stream)
        cuda.sim_product(b"cublasGemmEx")
    finally:
        cuda.sim_on_note(None)
    assert [words[0] for words in heard] == ["launch", "capture", "copy", "fill", "capture", "replay", "launch"]
    assert (heard[0][1], heard[6][1]) == ("heard_kernel", "cublasGemmEx")
    assert [words[1] for words in heard[2:4]] == [str(SIZE)] * 2 and heard[2][-1] == heard[3][-1] == "captured"
    assert heard[1][2] == heard[4][2] == heard[5][2]  # the graph
    launch(cuda, kernel)
    assert len(heard) == 7


def test_streams_and_events_of_another_device_are_refused(cuda, stream, monkeypatch):
    monkeypatch.setenv("SIMGPU_DEVICES", "2")
    event, source, target = made(cuda.cudaEventCreate), pinned(cuda, 10), device(cuda)
    assert cuda.cudaSetDevice(2) == INVALID_DEVICE
    assert cuda.cudaSetDevice(1) == 0
    try:
        assert copy(cuda, target, source, stream) == INVALID_HANDLE
        assert cuda.cudaEventRecord(event, made(cuda.cudaStreamCreate)) == INVALID_HANDLE
        assert copy(cuda, target, source, made(cuda.cudaStreamCreate)) == 0  # memory of any device is allowed
    finally:
        cuda.cudaSetDevice(0)


def test_memory_runs_out(cuda, monkeypatch):
    monkeypatch.setenv("SIMGPU_MIB", "1")
    assert cuda.cudaMalloc(byref(c_void_p()), c_size_t(2 << 20)) == OUT_OF_MEMORY


def test_memory_is_mapped_by_its_ipc_handle(cuda):
    """The handle is of this process. The real runtime would refuse that."""
    handle = (ctypes.c_char * 64)()
    memory = device(cuda)
    assert cuda.cudaIpcGetMemHandle(byref(handle), memory) == 0

    class Handle(ctypes.Structure):
        _fields_ = (("reserved", ctypes.c_char * 64),)

    mapped = made(cuda.cudaIpcOpenMemHandle, Handle.from_buffer_copy(handle), c_uint(1))
    assert mapped.value != memory.value
    ctypes.memset(memory, 11, SIZE)
    assert read(mapped) == b"\x0b" * SIZE
    assert cuda.cudaIpcCloseMemHandle(mapped) == 0
