"""Simulated GPUs: the CUDA engine whole, on a machine without one. $SIMGPU_DEVICES says how many; one if unset.

    LLUMD_TORCH=cuda bin/llumd kernels build ...      # as for a GPU, for 9.0a
    .venv/bin/python -m tools.simgpu -m pytest tests/gpu
    .venv/bin/python -m tools.simgpu -m bench.gpu --dry-run cuda:0
    .venv/bin/python -m tools.simgpu --launch-only -m bench.gpu_host

PyTorch's build for CUDA, FlashInfer and the compiled kernels run as they are, over a CUDA runtime of our own:
memory, streams, events, graphs, IPC and every launch are checked, and what kernels would compute is computed on the
CPU, from the very pointers they were given, when their stream gets there. So it shows a tensor on the wrong device, a
launch that no GPU would take, a call that may not be captured, a buffer filled again too early, a schedule or block
table that is off. It does not show what the kernels themselves do, nor how long a device would take.

runtime.c     the CUDA runtime
build         compiles it, and empty stand-ins for cuBLAS and the driver
device        computes PyTorch's operations
natives       computes FlashInfer's kernels and our own, from their arguments
hook/         has every Python process under it load these with PyTorch
"""
