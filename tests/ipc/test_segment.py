"""Shared-memory segments: allocated in full, private, without a name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from daemon.ipc import segment

SHM = Path("/dev/shm")


def own_files() -> list[str]:
    """Return the names of this process's segments in /dev/shm."""
    return [p.name for p in SHM.iterdir() if p.name.startswith(f"llumd-{os.getpid()}-")]


def test_a_segment_is_zeroed_and_private_and_has_no_name():
    fd = segment.create(10_000)
    try:
        assert own_files() == []
        found = os.fstat(fd)
        assert (found.st_size, found.st_nlink, found.st_mode & 0o777) == (10_000, 0, 0o600)
        assert found.st_blocks * 512 >= 10_000  # allocated, not only reserved
        assert bytes(segment.attach(fd)) == bytes(10_000)
    finally:
        os.close(fd)


def test_mappings_share_bytes_and_outlive_the_descriptor():
    fd = segment.create(4096)
    writer, reader = segment.attach(fd), segment.attach(fd, writable=False)
    os.close(fd)
    writer[5] = 9
    assert reader[5] == 9
    assert reader.readonly
    with pytest.raises(TypeError):
        reader[5] = 1


def test_a_segment_that_does_not_fit_is_an_error_at_once():
    """Larger than all of /dev/shm, so that the kernel refuses at once and does not fill it first."""
    stat = os.statvfs(SHM)
    if not stat.f_blocks:
        pytest.skip("/dev/shm has no limit here")
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(segment.SegmentError, match=r"MiB.*shm-size"):
        segment.create(stat.f_blocks * stat.f_frsize + (1 << 30))
    assert own_files() == []
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert os.statvfs(SHM).f_bavail * stat.f_frsize > 0
