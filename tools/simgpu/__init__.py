"""Simulated GPUs: the whole CUDA engine on a machine without a GPU. $SIMGPU_DEVICES: their number, default 1.

    LLUMD_TORCH=cuda bin/llumd kernels build ...      # as for a GPU, for 9.0a
    .venv/bin/python -m tools.simgpu -m pytest tests/gpu
    .venv/bin/python -m tools.simgpu -m bench.gpu --dry-run cuda:0
    .venv/bin/python -m tools.simgpu --launch-only -m bench.gpu_host

PyTorch's build for CUDA, FlashInfer and the compiled kernels run unchanged, over our own CUDA runtime. It checks
memory, streams, events, graphs, IPC and every launch. The results of kernels are computed on the CPU, from the
pointers that the launch got, when the stream reaches the launch. So it finds a tensor on the wrong device, a launch
that every GPU would refuse, a call that may not be captured, a buffer that is filled again too early, and a wrong
schedule or block table. It does not test the kernels themselves, and it does not measure the time of a device.

runtime.c     the CUDA runtime
cublaslt.c    the products that the engine gives to cuBLASLt itself
build         compiles them, and stubs of cuBLAS and of the driver
device        computes PyTorch's operations
natives       computes FlashInfer's kernels and our own, from their arguments
hook/         makes every child Python process load these with PyTorch
"""
