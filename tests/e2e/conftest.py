from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.daemon_process import Daemon, running

Start = Callable[..., Daemon]


@pytest.fixture
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short path, because the path of a socket may have at most 107 characters."""
    return tmp_path_factory.mktemp("d")


@pytest.fixture
def start(home: Path) -> Iterator[Start]:
    """Return a function that starts a daemon for one test."""
    with ExitStack() as stack:
        yield lambda *flags, **options: stack.enter_context(running(home, *flags, **options))


@pytest.fixture(scope="module")
def start_shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Return a function that starts a daemon for all tests of a module."""

    def go(*flags: str, **options: Any) -> Daemon:
        return stack.enter_context(running(tmp_path_factory.mktemp("d"), *flags, **options))

    with ExitStack() as stack:
        yield go
