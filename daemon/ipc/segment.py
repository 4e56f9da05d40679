"""Shared memory that cannot be left behind.

Only the supervisor creates segments: allocate in full, initialise, **unlink at once**, then hand the
descriptor to the children. Nobody opens a segment by name, so no kill -9 leaves anything in /dev/shm.
"""

from __future__ import annotations

import mmap
import os
import secrets

import posix_ipc


class SegmentError(OSError):
    """Shared memory could not be had; the message says how much was wanted."""


def create(size: int) -> int:
    """A new anonymous-by-unlinking segment of `size` zero bytes, mode 0600. Returns its descriptor.

    The space is allocated here: a full /dev/shm is an error now, not a SIGBUS in some child later.
    """
    name = f"/llumd-{os.getpid()}-{secrets.token_hex(8)}"
    shm = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600, size=0)
    try:
        shm.unlink()
        os.posix_fallocate(shm.fd, 0, size)
    except OSError as e:
        os.close(shm.fd)
        raise SegmentError(
            e.errno,
            f"/dev/shm has no room for {size / 2**20:.0f} MiB of shared memory; "
            "make it larger (docker: --shm-size) or lower kv_memory or journal_memory",
        ) from None
    return int(shm.fd)


def attach(fd: int, *, writable: bool = True) -> memoryview:
    """Map the whole segment behind `fd`. The mapping lives as long as the view does."""
    access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    return memoryview(mmap.mmap(fd, os.fstat(fd).st_size, mmap.MAP_SHARED, access))
