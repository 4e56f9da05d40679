"""Settings for all tests."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

from daemon.ipc.fabric import FabricHandles
from tests.ipc.factories import handles_of

# A landing must not hang on luck: there the examples are the same each time. At a desk they differ.
# And no example must be done in a time of its own: a machine may be busy.
settings.register_profile("desk", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "desk")


@pytest.fixture
def handles() -> Iterator[FabricHandles]:
    """The shared memory of one frontend and three engines."""
    with handles_of(1, 3) as made:
        yield made
