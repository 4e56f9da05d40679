"""Shared memory for tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from daemon.ipc.fabric import Fabric, FabricHandles, Topology


@contextmanager
def fabric_handles(frontends: int, engines: int) -> Iterator[FabricHandles]:
    """Create the segments and doorbells of a daemon, with 1 MiB per journal and outbox; close them at the end."""
    created = Fabric.create(Topology(frontends, engines), 1 << 20, 1 << 20)
    yield created
    for fd in (
        created.segment,
        *created.journals,
        *created.outboxes,
        *created.doorbells,
        *sum(created.frontend_channels, ()),
    ):
        os.close(fd)
