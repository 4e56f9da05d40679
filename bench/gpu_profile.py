"""Which kernels a step runs, and how long each takes: by PyTorch's profiler, over the runner's own passes.

On the CPU, for a dry run, PyTorch's operations take the place of kernels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.gpu_peaks import synchronize
from bench.gpu_steps import RunnerOptions, decoding_requests
from daemon.engine.cuda.runner import CudaRunner
from daemon.engine.request import Request
from daemon.engine.runner import Row, StepPlan

_STEPS = 6
_LONGEST_NAME = 40


class KernelShare(NamedTuple):
    """A kernel's part of one step. `us`: of all its calls in the step."""

    name: str
    calls: float
    us: float


def decode(runner: CudaRunner, options: RunnerOptions, batch: int, context: int) -> list[KernelShare]:
    """Return the kernels of a decode step of `batch` sequences, those that take the most time first."""
    requests = decoding_requests(runner, batch, context, 2 * _STEPS, options.block_size)
    lengths = iter(range(context, context + 2 * _STEPS))
    return _shares(lambda: _decode(runner, requests, next(lengths)), _STEPS, options.device)


def prefill(runner: CudaRunner, options: RunnerOptions, tokens: int) -> list[KernelShare]:
    """Return the kernels of a prefill chunk of `tokens` tokens."""
    [request] = decoding_requests(runner, 1, tokens, 1, options.block_size)
    plan = StepPlan([Row(request, 0, tokens, True)], 0)
    return _shares(lambda: runner.execute(plan), 2, options.device)


def _shares(step: Callable[[], object], steps: int, device: str) -> list[KernelShare]:
    on_gpu = device != "cpu"
    step()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            step()
        synchronize(device)
    calls: dict[str, int] = {}
    us: dict[str, float] = {}
    for event in profiler.events():
        if event.device_type == (DeviceType.CUDA if on_gpu else DeviceType.CPU):
            name = _short(event.name)
            calls[name] = calls.get(name, 0) + 1
            us[name] = us.get(name, 0.0) + (event.device_time_total if on_gpu else event.self_cpu_time_total)
    found = [KernelShare(name, calls[name] / steps, us[name] / steps) for name in calls]
    return sorted(found, key=lambda share: -share.us)


def _decode(runner: CudaRunner, requests: Sequence[Request], length: int) -> None:
    rows = [Row(request, length - 1, 1, True) for request in requests]
    result = runner.execute(StepPlan(rows, len(rows)))
    for request, token in zip(requests, result.tokens, strict=True):
        request.tokens.append(token)


def _short(name: str) -> str:
    """Return the name of a kernel without its template arguments."""
    bare = re.sub(r"<.*", "", re.sub(r"^void ", "", name))
    return bare.rpartition("::")[2][:_LONGEST_NAME] or name[:_LONGEST_NAME]
