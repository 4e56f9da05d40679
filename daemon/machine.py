"""What the machine gives to this process: CPUs, memory, room for shared memory, descriptors.

A control group (a container, a systemd unit) can give less than the machine has. Both versions of groups count.
"""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_MAX_DESCRIPTORS = 1 << 17  # no process needs more; the hard limit in a container may be a thousand million
_SHARED_MEMORY = "/dev/shm"
_CPUINFO = Path("/proc/cpuinfo")
_BF16 = {"avx512_bf16", "amx_tile"}  # instructions that multiply bf16


class Machine(NamedTuple):
    """The resources that the daemon can use."""

    cpus: int
    memory: int  # bytes that are free, with the page cache that the kernel can drop
    shared_memory: int  # bytes that are free in /dev/shm
    descriptors: int  # files that one process may open
    bf16: bool = False  # see `has_bf16`


def measure() -> Machine:
    """Return what this process can use now."""
    return Machine(cpus(), available_memory(), _free_shared_memory(), _max_descriptors(), has_bf16())


def cpus(groups: Path = _CGROUPS, own: Path = _OWN_CGROUPS) -> int:
    """Return the number of CPUs that this process may use: its affinity, or its quota if that is less.

    A quota of one and a half CPUs counts as two. `groups` and `own`: the mounted control groups and their list.
    """
    allowed = len(os.sched_getaffinity(0))
    quotas = [*_quotas_v2(groups, own), *_quotas_v1(groups, own)]
    return max(1, min([allowed, *(math.ceil(q) for q in quotas)]))


def available_memory(groups: Path = _CGROUPS, own: Path = _OWN_CGROUPS) -> int:
    """Return the free memory in bytes: of the machine, or of the control group if that is less."""
    return max(0, min([_machine_memory(), *_free_memory_v2(groups, own), *_free_memory_v1(groups, own)]))


def has_bf16(cpuinfo: Path = _CPUINFO) -> bool:
    """Return True if the CPU multiplies bf16. Without it CPU engines compute in fp32, unless `dtype` is bf16."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return False
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return not _BF16.isdisjoint(flags)


def raise_descriptor_limit() -> None:
    """Raise the soft limit of open files to the hard one, for all processes: each HTTP connection needs one.

    The soft limit is low only for programs that use select(), which this one does not.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _max_descriptors()
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def _machine_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _free_shared_memory() -> int:
    """Return the free bytes of /dev/shm. A file system without a size has the room that the memory has."""
    try:
        found = os.statvfs(_SHARED_MEMORY)
    except OSError:
        return 0
    return found.f_bavail * found.f_frsize if found.f_blocks else _machine_memory()


def _max_descriptors() -> int:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MAX_DESCRIPTORS)


def _quotas_v2(groups: Path, own: Path) -> Iterator[float]:
    for directory in _directories(groups, own, ""):
        quota, _, period = _text(directory / "cpu.max").partition(" ")
        if quota.isdecimal() and period.isdecimal():
            yield int(quota) / int(period)


def _quotas_v1(groups: Path, own: Path) -> Iterator[float]:
    for directory in _directories(groups, own, "cpu"):
        quota, period = _text(directory / "cpu.cfs_quota_us"), _text(directory / "cpu.cfs_period_us")
        if quota.isdecimal() and period.isdecimal():  # a quota of -1 is none
            yield int(quota) / int(period)


def _free_memory_v2(groups: Path, own: Path) -> Iterator[int]:
    for directory in _directories(groups, own, ""):
        limit, used = _text(directory / "memory.max"), _text(directory / "memory.current")
        if limit.isdecimal() and used.isdecimal():
            yield int(limit) - int(used) + sum(_statistic(directory, n) for n in ("inactive_file", "active_file"))


def _free_memory_v1(groups: Path, own: Path) -> Iterator[int]:
    for directory in _directories(groups, own, "memory"):
        limit, used = _text(directory / "memory.limit_in_bytes"), _text(directory / "memory.usage_in_bytes")
        if limit.isdecimal() and used.isdecimal():
            yield (
                int(limit)
                - int(used)
                + sum(_statistic(directory, n) for n in ("total_inactive_file", "total_active_file"))
            )


def _directories(groups: Path, own: Path, controller: str) -> Iterator[Path]:
    """Return the directory of this process's control group, then of each group around it.

    `controller` "" is version 2, which has one tree for all. In a container the path of the group can be one that is
    not mounted there; then the root of the mount is the group.
    """
    for line in _text(own).splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            root = groups / controllers if controllers else groups
            root = root if root.is_dir() else groups / controller
            directory = root / path.lstrip("/")
            yield directory
            yield from (parent for parent in directory.parents if parent == root or root in parent.parents)


def _statistic(directory: Path, name: str) -> int:
    for line in _text(directory / "memory.stat").splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0


def _text(file: Path) -> str:
    """Return the content of a file of the kernel; "" if there is none."""
    try:
        return file.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
