"""Peak rates of a device, to which the benchmark relates its figures."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

_ROUNDS = 6  # the first one is not counted
_TIMES = 5  # per round


class Peaks(NamedTuple):
    """Bytes/s read and written by a copy on the device, and FLOP/s of a matrix product."""

    bandwidth: float
    rate: float


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def peaks(file: Path, device: str, copy_bytes: int, n: int) -> Peaks:
    """Return the peaks in `file`. If it is missing, measure a copy of `copy_bytes` and a product of `n` cubed."""
    if file.exists():
        return Peaks(**json.loads(file.read_text()))
    found = Peaks(_bandwidth(device, copy_bytes), _rate(device, n))
    if device != "cpu":
        torch.cuda.empty_cache()  # so that the runner can use all free memory
    file.write_text(json.dumps(found._asdict()))
    return found


def _bandwidth(device: str, copy_bytes: int) -> float:
    source = torch.zeros(copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * copy_bytes / _seconds(lambda: target.copy_(source), device)


def _rate(device: str, n: int) -> float:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / _seconds(lambda: a @ b, device)


def _seconds(work: Callable[[], Any], device: str) -> float:
    """Return the median seconds of `work`, which runs repeatedly without a pause."""
    times = []
    for _ in range(_ROUNDS):
        synchronize(device)
        began = time.perf_counter()
        for _ in range(_TIMES):
            work()
        synchronize(device)
        times.append((time.perf_counter() - began) / _TIMES)
    return sorted(times[1:])[2]
