"""CPUs and memory of this process, with the limits of its control group, for both versions of control groups."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from daemon.machine import available_memory, cpus, has_bf16, measure

GIB = 1 << 30
ALLOWED = len(os.sched_getaffinity(0))


def groups(root: Path, own: str, files: dict[str, str]) -> tuple[Path, Path]:
    """Write the files of a control group file system. Return it and the list of this process's groups."""
    for name, text in files.items():
        file = root / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    (root / "own").write_text(own + "\n")
    return root / "cgroup", root / "own"


@pytest.mark.parametrize(
    ("own", "files"),
    [
        ("0::/", {"cpu.max": "50000 100000"}),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "100000 100000"}),  # the group around it limits it
        ("0::/elsewhere/b", {"cpu.max": "20000 100000"}),  # a container: the path is the host's
        ("4:cpu,x:/\n0::/", {"cpu,x/cpu.cfs_quota_us": "100000", "cpu,x/cpu.cfs_period_us": "100000"}),
        ("1:cpu:/", {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}),
    ],
)  # fmt: skip
def test_a_quota_limits_the_cpus(tmp_path: Path, own: str, files: dict[str, str]):
    assert cpus(*groups(tmp_path, own, files)) == 1


@pytest.mark.parametrize(
    ("own", "files"),
    [
        ("", {}),
        ("0::/", {"cpu.max": "max 100000"}),
        ("0::/", {"cpu.max": "99900000 100000"}),
        ("0::/", {"cpu.max": ""}),
        ("1:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}),
    ],
)
def test_without_a_quota_the_affinity_counts(tmp_path: Path, own: str, files: dict[str, str]):
    assert cpus(*groups(tmp_path, own, files)) == ALLOWED


def test_a_group_limits_the_memory(tmp_path: Path):
    files = {"a/memory.max": str(GIB), "a/memory.current": str(GIB // 2)}
    # A file that was read twice is active cache; the kernel drops that, too.
    files["a/memory.stat"] = f"anon 1\ninactive_file {GIB // 8}\nactive_file {GIB // 8}"
    assert available_memory(*groups(tmp_path / "2", "0::/a/b", files)) == GIB // 2 + GIB // 4
    old = {"memory/memory.limit_in_bytes": str(GIB), "memory/memory.usage_in_bytes": str(2 * GIB)}
    assert available_memory(*groups(tmp_path / "1", "7:memory:/", old)) == 0
    unlimited = {"memory.max": "max", "memory.current": "5"}
    assert available_memory(*groups(tmp_path / "0", "0::/", unlimited)) > 0


def test_this_machine():
    found = measure()
    assert 1 <= found.cpus <= ALLOWED
    assert min(found.memory, found.shared_memory, found.descriptors) > 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor: 0\nflags\t\t: fpu avx512f avx512_bf16\n", True),
        ("flags\t\t: fpu amx_bf16 amx_tile\n", True),
        ("flags\t\t: fpu avx2\nbugs\t\t: avx512_bf16\n", False),
        ("Features\t: fp asimd bf16\n", False),  # oneDNN's bf16 needs AVX-512
        ("", False),
    ],
)
def test_cpus_that_multiply_bf16(tmp_path: Path, text: str, expected: bool):
    file = tmp_path / "cpuinfo"
    file.write_text(text)
    assert has_bf16(file) is expected
    assert not has_bf16(tmp_path / "missing")
