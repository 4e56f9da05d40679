"""The log tells when kernels are compiled: at the first use of each shape."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from daemon.engine import jit


@pytest.mark.parametrize("is_first", [False, True])
def test_the_first_use_of_a_shape_is_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, is_first: bool
) -> None:
    """At the first start of a version the log tells it for all kernels."""
    monkeypatch.setattr(jit, "_DIRECTORY", tmp_path)
    monkeypatch.setattr(jit, "_CACHE", True)
    monkeypatch.setattr(jit, "_is_first", is_first)
    with caplog.at_level(logging.INFO):
        for key in [(4, 2), (4, 2), (8, 2), (4, 2)]:
            jit.log_first_use("models of this shape", key)
    assert len(caplog.messages) == (0 if is_first else 2)
    assert all("for models of this shape (once)" in message for message in caplog.messages)
