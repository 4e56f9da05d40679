"""Shared-memory segments that never stay behind after their processes.

Only the supervisor creates segments. It **unlinks each at once**, allocates all its space and passes the descriptor
to the children. No process opens a segment by name, so no kill -9 leaves a file in /dev/shm.
"""

from __future__ import annotations

import errno
import mmap
import os
import secrets

import posix_ipc


class SegmentError(OSError):
    """A segment cannot be allocated; the message gives its size."""


def create(size: int) -> int:
    """Create an unlinked segment of `size` zero bytes, mode 0600, and return its descriptor.

    This allocates all the space: a full /dev/shm is a SegmentError here, not a SIGBUS in a child later.
    """
    name = f"/llumd-{os.getpid()}-{secrets.token_hex(8)}"
    try:
        shm = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600, size=0)
    except posix_ipc.Error as e:  # not an OSError: /dev/shm is missing or may not be written
        raise SegmentError(errno.EACCES, f"cannot create shared memory in /dev/shm: {e}") from None
    try:
        shm.unlink()
        os.posix_fallocate(shm.fd, 0, size)
    except OSError as e:
        os.close(shm.fd)
        raise SegmentError(
            e.errno,
            f"/dev/shm has no room for {size / 2**20:.0f} MiB of shared memory; "
            "make it larger (docker: --shm-size) or lower kv_memory, journal_memory or outbox_memory",
        ) from None
    return int(shm.fd)


def attach(fd: int, *, writable: bool = True) -> memoryview:
    """Map the whole segment of descriptor `fd`. The mapping exists as long as the returned view."""
    access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    return memoryview(mmap.mmap(fd, os.fstat(fd).st_size, mmap.MAP_SHARED, access))
