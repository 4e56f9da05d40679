"""Settings for all tests."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

from daemon.control.fabric import Fabric, FabricHandles, Topology

# A landing must not hang on luck: there the examples are the same each time. At a desk they differ.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


@pytest.fixture
def handles() -> Iterator[FabricHandles]:
    """The shared memory of one frontend and three engines."""
    made = Fabric.create(Topology(1, 3), 1 << 20)
    yield made
    for fd in (made.segment, *made.journals, *made.doorbells):
        os.close(fd)
