from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.models.hub.stand_in import Hub, hub_of_a_test


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub for one test, with empty caches."""
    with hub_of_a_test(tmp_path, monkeypatch) as hub:
        yield hub
