"""Shared memory for tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from daemon.ipc.fabric import Fabric, FabricHandles, Topology


@contextmanager
def handles_of(frontends: int, engines: int) -> Iterator[FabricHandles]:
    """That of a box of so many processes, with 1 MiB for each journal."""
    made = Fabric.create(Topology(frontends, engines), 1 << 20)
    yield made
    for fd in (made.segment, *made.journals, *made.doorbells):
        os.close(fd)
