"""Keeping an engine's threads on the processors next to its GPU, and so the host memory they take."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

log = logging.getLogger(__name__)

_SYSFS = Path("/sys")
_TASKS = Path("/proc/self/task")


def parse_cpus(text: str) -> frozenset[int]:
    """Processors from the kernel's list format, "0-3,8,10-11\\n". Raises ValueError."""
    cpus: set[int] = set()
    for part in text.strip().split(",") if text.strip() else []:
        if not (found := re.fullmatch(r"(\d+)(?:-(\d+))?", part)):
            raise ValueError(f"not a list of processors: {text!r}")
        cpus.update(range(int(found[1]), int(found[2] or found[1]) + 1))
    return frozenset(cpus)


def cpus_near(address: str, sysfs: Path = _SYSFS) -> frozenset[int]:
    """Processors of the NUMA node at which a PCI device ("0000:1b:00.0") sits; empty where that is not told."""
    try:
        node = int((sysfs / "bus/pci/devices" / address.lower() / "numa_node").read_text())
        return parse_cpus((sysfs / f"devices/system/node/node{node}/cpulist").read_text())
    except (OSError, ValueError):  # no such device, or -1: the machine has but one node
        return frozenset()


def stay_near(address: str, sysfs: Path = _SYSFS) -> frozenset[int]:
    """Have every thread of this process, and those it starts from now on, run at the device's NUMA node.

    Returns the processors that are left; empty, and nothing changes, if none of those allowed is near or none is far.
    """
    allowed = os.sched_getaffinity(0)
    near = cpus_near(address, sysfs) & allowed
    if not near or near == allowed:
        return frozenset()
    for thread in _TASKS.iterdir():
        try:
            os.sched_setaffinity(int(thread.name), near)
        except ProcessLookupError:  # it has ended
            continue
        except OSError as e:
            log.warning("cannot keep threads near %s: %s", address, e.strerror)
            return frozenset()
    log.info("threads stay on the %d processors near %s", len(near), address)
    return near
