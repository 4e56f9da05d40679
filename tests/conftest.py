"""Settings, markers and fixtures for all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from daemon.ipc.fabric import FabricHandles
from tests.ipc.factories import fabric_handles

# CI draws the same examples each time, so that it does not fail by chance. A developer's runs differ.
# No example has a deadline of its own: the machine may be busy.
settings.register_profile("desk", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.register_profile("fast", deadline=None, max_examples=25)
settings.load_profile("ci" if os.environ.get("CI") else "desk")

# No test may reach the network by the name of a model. Tests of the hub have a hub of their own.
os.environ["HF_HUB_OFFLINE"] = "1"

TESTS = Path(__file__).parent
FOLDERS = {"e2e": "e2e", "protocol": "protocol", "gpu": "gpu"}  # folder below tests: its marker


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test by its folder. A test that has no marker of a longer kind is `unit`."""
    for item in items:
        marker = FOLDERS.get(item.path.relative_to(TESTS).parts[0])
        if marker is not None:
            item.add_marker(marker)
        elif not any(item.get_closest_marker(name) for name in ("integration", "e2e", "slow")):
            item.add_marker("unit")


@pytest.fixture
def handles() -> Iterator[FabricHandles]:
    """The shared memory of one frontend and three engines."""
    with fabric_handles(1, 3) as made:
        yield made
