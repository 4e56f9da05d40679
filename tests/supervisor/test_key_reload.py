"""Keys at run time: all frontends accept one set, and a file with an error changes nothing."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from daemon.api.auth import SharedKeys
from daemon.api.errors import ApiError
from daemon.api.key_file import read_key_file
from daemon.ipc.keys_page import KEYS_PAGE_BYTES, KeysOutcome, KeysReader, KeysRequester
from daemon.supervisor.key_reload import KeyReload, KeySource


class Harness:
    """A supervisor's keys, a key file and two frontends."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.page = memoryview(bytearray(KEYS_PAGE_BYTES))
        self.reload = KeyReload(self.page, KeySource(read_key_file(file), lambda: read_key_file(file)))
        self.coordinator = KeysRequester(self.page)
        self.frontends = [self.frontend(), self.frontend()]

    def frontend(self) -> SharedKeys:
        return SharedKeys(KeysReader(self.page.toreadonly()))

    def accepted(self, *keys: str) -> list[str]:
        """Return which of `keys` are accepted; all frontends, and one that starts now, must agree."""
        answers = [[k for k in keys if accepts(f, k)] for f in (*self.frontends, self.frontend())]
        assert answers[0] == answers[1] == answers[2]
        return answers[0]

    def ask(self) -> KeysOutcome:
        """Ask as the coordinator does; return the outcome after the supervisor's next tick."""
        number = self.coordinator.request()
        self.reload.poll()
        outcome = self.coordinator.outcome()
        assert outcome is not None
        assert outcome.request == number
        return outcome


def accepts(frontend: SharedKeys, key: str) -> bool:
    try:
        frontend.check(f"Bearer {key}")
    except ApiError as e:
        assert e.status == 401
        return False
    return True


@pytest.fixture
def harness(tmp_path: Path) -> Harness:
    (file := tmp_path / "keys").write_text("old tenant=a\nkept\n")
    return Harness(file)


def test_an_edited_file_changes_nothing_before_a_reload_and_all_frontends_after_it(harness: Harness):
    harness.file.write_text("new\nkept priority=low\n")
    harness.reload.poll()
    assert harness.accepted("old", "kept", "new") == ["old", "kept"]
    assert harness.ask() == KeysOutcome(1, keys=2, tenants=0, added=1, removed=1, changed=1)
    assert harness.accepted("old", "kept", "new") == ["kept", "new"]
    assert harness.frontends[0].check("Bearer kept").priority == 1


def test_a_signal_reloads_at_the_next_tick(harness: Harness):
    harness.file.write_text("new\n")
    harness.reload.request()
    assert harness.accepted("old", "kept", "new") == ["old", "kept"]
    harness.reload.poll()
    assert harness.accepted("old", "kept", "new") == ["new"]


@pytest.mark.parametrize("content", [None, "", "# none\n", "secret team=a\n", "kept\nkept priority=low\n", "\0\xff"])
def test_a_file_with_an_error_changes_nothing_and_says_so(
    harness: Harness, content: str | None, caplog: pytest.LogCaptureFixture
):
    harness.file.unlink()
    if content is not None:
        harness.file.write_bytes(content.encode("latin-1"))
    outcome = harness.ask()
    assert "api_key_file" in outcome.error
    assert (outcome.keys, outcome.tenants) == (2, 1)
    assert harness.accepted("old", "kept") == ["old", "kept"]
    [record] = caplog.records
    assert record.levelno == logging.ERROR
    assert record.getMessage() == f"{outcome.error}; the 2 former keys stay accepted"
    assert "secret" not in record.getMessage()
    harness.file.write_text("new\n")
    assert harness.ask().error == ""
    assert harness.accepted("old", "new") == ["new"]


def test_no_key_is_accepted_before_the_first_publication():
    assert not accepts(SharedKeys(KeysReader(memoryview(bytearray(KEYS_PAGE_BYTES)))), "any")


def test_without_a_key_file_there_is_nothing_to_reload(caplog: pytest.LogCaptureFixture):
    page = memoryview(bytearray(KEYS_PAGE_BYTES))
    reload = KeyReload(page, None)
    reload.request()
    with caplog.at_level(logging.INFO):
        reload.poll()
    assert "api_key_file is not set" in caplog.text
    assert KeysRequester(page).outcome() is None


def test_neither_page_nor_log_contains_a_key(harness: Harness, caplog: pytest.LogCaptureFixture):
    harness.file.write_text("a-very-secret-key tenant=visible\n")
    with caplog.at_level(logging.INFO):
        harness.ask()
    assert b"very-secret" not in bytes(harness.page)
    assert b"visible" in bytes(harness.page)
    assert "secret" not in caplog.text
