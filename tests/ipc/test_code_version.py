"""The version of the code: comments and texts make no difference, all else does."""

from __future__ import annotations

from pathlib import Path

import pytest

from daemon.ipc import code_version
from daemon.ipc.code_version import fits, installed


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(code_version, "_ROOT", tmp_path)
    (tmp_path / "ipc").mkdir()
    file = tmp_path / "ipc" / "ring.py"
    file.write_text('"""A text."""\n\nSIZE = 4  # bytes\n\n\ndef f():\n    """Do it."""\n    return SIZE\n')
    return file


def test_comments_and_docstrings_may_change(source: Path) -> None:
    version = installed()
    assert fits(version)
    source.write_text('"""Another text."""\nSIZE = 4\ndef f():\n    """Do that."""\n    return SIZE\n')
    assert installed().source != version.source
    assert fits(version)


@pytest.mark.parametrize("text", ["SIZE = 8\n", '"""A text."""\nSIZE = 4\n', ""])
def test_code_may_not_change(source: Path, text: str) -> None:
    version = installed()
    source.write_text(text)
    assert not fits(version)


def test_a_new_file_is_a_change(source: Path) -> None:
    version = installed()
    source.with_name("board.py").write_text("X = 1\n")
    assert not fits(version)


def test_the_code_of_this_project_fits_itself() -> None:
    assert fits(installed())
    assert {"child.py", "messages.py", "outbox.py", "config.py"} <= {file.name for file in code_version._files()}
