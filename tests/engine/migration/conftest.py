"""Two engines with one journal, and requests in it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from daemon.engine.request import Request
from tests.engine.migration.harness import Engine, Journal


@pytest.fixture
def journal() -> Journal:
    return Journal()


@pytest.fixture
def source(journal: Journal) -> Engine:
    return Engine(journal)


@pytest.fixture
def destination(journal: Journal) -> Engine:
    return Engine(journal)


@pytest.fixture
def make(journal: Journal) -> Callable[..., Request]:
    return journal.make_request
