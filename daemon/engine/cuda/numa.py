"""Keeps an engine's threads on the CPUs near its GPU, and so the host memory that they allocate."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

log = logging.getLogger(__name__)

_SYSFS = Path("/sys")
_TASKS = Path("/proc/self/task")


def parse_cpus(text: str) -> frozenset[int]:
    """Parse the kernel's list format of CPUs, "0-3,8,10-11\\n". Raises ValueError."""
    cpus: set[int] = set()
    for part in text.strip().split(",") if text.strip() else []:
        if not (found := re.fullmatch(r"(\d+)(?:-(\d+))?", part)):
            raise ValueError(f"not a list of CPUs: {text!r}")
        cpus.update(range(int(found[1]), int(found[2] or found[1]) + 1))
    return frozenset(cpus)


def cpus_near(address: str, sysfs: Path = _SYSFS) -> frozenset[int]:
    """Return the CPUs of the NUMA node of a PCI device ("0000:1b:00.0"). Empty if the machine does not report it."""
    try:
        node = int((sysfs / "bus/pci/devices" / address.lower() / "numa_node").read_text())
        return parse_cpus((sysfs / f"devices/system/node/node{node}/cpulist").read_text())
    except (OSError, ValueError):  # no such device, or node -1: the machine has only one node
        return frozenset()


def stay_near(address: str, sysfs: Path = _SYSFS) -> frozenset[int]:
    """Bind every thread of this process, and those that it starts later, to the device's NUMA node.

    Return the CPUs of the threads. If none of the allowed CPUs is near, or all are, change nothing and return the
    empty set.
    """
    allowed = os.sched_getaffinity(0)
    near = cpus_near(address, sysfs) & allowed
    if not near or near == allowed:
        return frozenset()
    for thread in _TASKS.iterdir():
        try:
            os.sched_setaffinity(int(thread.name), near)
        except ProcessLookupError:  # the thread has ended
            continue
        except OSError as e:
            log.warning("cannot keep threads near %s: %s", address, e.strerror)
            return frozenset()
    log.info("threads stay on the %d CPUs near %s", len(near), address)
    return near
