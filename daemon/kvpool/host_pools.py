"""The other engines' KV pools in shared memory, mapped into this engine.

Pools have no names. The process table gives the descriptor under which the supervisor holds each pool, and an engine
opens that descriptor through /proc. The kernel allows this to a process with the supervisor's user and capabilities,
which its children have, unless the supervisor is non-dumpable. Without that permission an engine has no peers and no
request migrates.
"""

from __future__ import annotations

import os
import stat

from daemon.ipc import segment
from daemon.ipc.fabric import Topology
from daemon.ipc.process_table import ProcessFacts, TableReader
from daemon.kvpool.pool_directory import PoolDirectory
from daemon.kvpool.pool_opener import CannotOpen


class HostPools(PoolDirectory[memoryview]):
    """The pool segments of all engines, each as a writable view of its bytes.

    A view that a caller still holds after its engine's death stays valid memory, which no process reads any more.
    `table`, `bell`, `own`: see `PoolDirectory`. `supervisor`: its pid.
    """

    def __init__(self, table: TableReader, topology: Topology, supervisor: int, bell: int, own: int = -1) -> None:
        super().__init__(table, topology, bell, own)
        self._supervisor = supervisor

    def _open_pool(self, engine: int, row: ProcessFacts) -> memoryview:
        """Map the supervisor's descriptor `row.pool_fd`.

        Raises CannotOpen without permission, OSError if the descriptor is no file of `row.pool_bytes` bytes.

        The descriptor's number may belong to another pool by now. `PoolDirectory` finds that out: the supervisor
        publishes a death before it reuses the number.
        """
        path = f"/proc/{self._supervisor}/fd/{row.pool_fd}"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except PermissionError as e:
            raise CannotOpen(str(e)) from e
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode) or found.st_size != row.pool_bytes or found.st_nlink:
                raise OSError(f"{path} is not a KV pool of {row.pool_bytes} bytes")
            return segment.attach(fd)
        finally:
            os.close(fd)
