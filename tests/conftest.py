"""Settings for all tests."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

from daemon.control.fabric import FabricHandles
from tests.control.boxes import handles_of

# A landing must not hang on luck: there the examples are the same each time. At a desk they differ.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


@pytest.fixture
def handles() -> Iterator[FabricHandles]:
    """The shared memory of one frontend and three engines."""
    with handles_of(1, 3) as made:
        yield made
