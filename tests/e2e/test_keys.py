"""API keys in the real daemon: one set for all frontends, changed at run time; tenants, and priorities of keys."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e import hash_engine
from tests.e2e.conftest import Start
from tests.e2e.daemon_process import Daemon, wait_for
from tests.e2e.load_client import Clients
from tests.e2e.mover import migrate

TENANTS = "red tenant=red\nred-too tenant=red\nblue tenant=blue\nplain\nplain-too\n"


class KeyFile:
    """The key file of a running daemon. Its first key, which the tests use themselves, never changes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.write("")

    def write(self, lines: str) -> None:
        self.path.write_text(f"observer\n{lines}")
        self.path.chmod(0o600)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> KeyFile:
    return KeyFile(tmp_path_factory.mktemp("k") / "keys")


@pytest.fixture(scope="module")
def daemon(start_shared: Start, file: KeyFile) -> Daemon:
    flags = ("--frontends", "2", "--stub-step", "10ms", "--no-rebalance", "--api-key-file", str(file.path))
    return start_shared(*flags, engine="hash", key="observer")


def change(daemon: Daemon, file: KeyFile, lines: str) -> None:
    file.write(lines)
    done = daemon.ctl("reload")
    assert (done.returncode, done.stderr) == (0, "")


def answers(daemon: Daemon, key: str) -> set[int]:
    """Return the status codes that this key gets, of so many connections that each frontend answers some."""
    headers = {"Authorization": f"Bearer {key}"}
    return {httpx.get(f"{daemon.url}/v1/models", headers=headers).status_code for _ in range(24)}


def complete(daemon: Daemon, key: str, prompt: list[int], **fields: Any) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {key}"}
    body = {"prompt": prompt, "max_tokens": 2} | fields
    response = httpx.post(f"{daemon.url}/v1/completions", json=body, headers=headers, timeout=30)
    assert response.status_code == 200, response.text
    return response.json()


def cached_tokens(daemon: Daemon, key: str, prompt: list[int], **fields: Any) -> int:
    return complete(daemon, key, prompt, **fields)["usage"]["prompt_tokens_details"]["cached_tokens"]


# -- the set of keys


def test_all_frontends_accept_one_set_of_keys_whatever_dies_and_is_edited(daemon: Daemon, file: KeyFile) -> None:
    change(daemon, file, "old\n")
    file.write("new\n")
    before = daemon.kill("frontend", 0)
    daemon.await_successor("frontend", 0, before)
    assert (answers(daemon, "old"), answers(daemon, "new")) == ({200}, {401})
    done = daemon.ctl("reload")
    assert (done.returncode, done.stdout) == (
        0, "accepted keys: 2 (1 added, 1 removed, 0 changed); named tenants: 0\n",
    )  # fmt: skip
    assert (answers(daemon, "old"), answers(daemon, "new")) == ({401}, {200})
    before = daemon.kill("coordinator")
    daemon.await_successor("coordinator", 0, before)
    change(daemon, file, "newer\n")
    assert (answers(daemon, "new"), answers(daemon, "newer")) == ({401}, {200})


def test_a_file_with_an_error_changes_nothing_and_says_so(daemon: Daemon, file: KeyFile) -> None:
    change(daemon, file, "good\n")
    file.write("good\nvery-secret tenant=no/slash\n")
    done = daemon.ctl("reload")
    assert done.returncode == 1
    assert done.stderr.startswith(f"llumctl: api_key_file: line 3 of {file.path}: `tenant=` must be followed by")
    assert done.stderr.endswith("the 2 former keys stay accepted\n")
    assert "api_key_file: line 3" in daemon.ctl("status").stdout
    assert answers(daemon, "good") == {200}
    change(daemon, file, "good\n")
    assert "api_key_file: line 3" not in daemon.ctl("status").stdout
    assert "very-secret" not in daemon.log


def test_sighup_to_the_supervisor_reloads_too(daemon: Daemon, file: KeyFile) -> None:
    change(daemon, file, "old\n")
    file.write("new\n")
    daemon.process.send_signal(signal.SIGHUP)
    wait_for("the new key", lambda: answers(daemon, "new") == {200})
    assert answers(daemon, "old") == {401}


# -- priorities


def test_a_key_caps_the_priority_of_its_requests(daemon: Daemon, file: KeyFile) -> None:
    change(daemon, file, "low priority=low\nplain\nup-to-high max-priority=high\n")
    shown = {}
    for key in ("low", "plain", "up-to-high"):
        body = {"prompt": [5] * 20, "max_tokens": hash_engine.ENDLESS, "stream": True, "priority": -100}
        headers = {"Authorization": f"Bearer {key}"}
        with httpx.stream("POST", f"{daemon.url}/v1/completions", json=body, headers=headers) as response:
            assert response.status_code == 200
            [row] = wait_for("the request", daemon.requests)
            shown[key] = row["priority"]
        daemon.await_idle()
    assert shown == {"low": 1, "plain": 0, "up-to-high": -1}


# -- tenants


def test_tenants_share_no_prefix_and_see_no_hit(daemon: Daemon, file: KeyFile) -> None:
    change(daemon, file, TENANTS)
    prompt = hash_engine.prompt_of(1, 65)
    assert daemon.ctl("drain", "1").returncode == 0  # one engine, so that dispatch cannot hide a hit
    found = [
        cached_tokens(daemon, key, prompt)
        for key in ("red", "blue", "plain", "red-too", "blue", "plain-too", "observer")
    ]
    assert found == [0, 0, 0, 64, 64, 64, 64]
    assert cached_tokens(daemon, "red", prompt, cache_salt="mine") == 0
    assert cached_tokens(daemon, "red-too", prompt, cache_salt="mine") == 64
    assert cached_tokens(daemon, "blue", prompt, cache_salt="mine") == 0
    assert cached_tokens(daemon, "plain", prompt, cache_salt="\u00ffred\u00ff") == 0
    assert daemon.ctl("undrain", "1").returncode == 0


def test_a_migration_uses_no_block_of_another_tenant(daemon: Daemon, file: KeyFile) -> None:
    """Engine 1 holds the prompt for one tenant, and the request that moves there belongs to the other."""
    change(daemon, file, TENANTS)
    body = hash_engine.request(2, length=129, output=hash_engine.ENDLESS)
    assert daemon.ctl("drain", "0").returncode == 0
    assert cached_tokens(daemon, "red", body["prompt"]) == 0
    assert daemon.ctl("undrain", "0").returncode == 0
    assert daemon.ctl("drain", "1").returncode == 0
    skipped = {}
    for key in ("blue", "red"):
        with Clients(daemon, [body], key=key) as clients:
            clients.await_tokens(5)
            assert daemon.ctl("undrain", "1").returncode == 0
            [row] = daemon.requests()
            migrate(daemon, row["id"], 1)
            wait_for("the move", lambda: daemon.requests()[0]["engine"] == 1)
            assert all(map(hash_engine.exact_so_far, [body], clients.stop()))
        daemon.await_idle()
        events = daemon.ctl("events", "--json", "--request", row["id"], "--kind", "move_ended")
        skipped[key] = json.loads(events.stdout)["skipped"]
        assert daemon.ctl("drain", "1").returncode == 0
    assert daemon.ctl("undrain", "1").returncode == 0
    assert skipped == {"blue": 0, "red": 8}


# -- shares


def test_the_flood_of_one_key_refuses_neither_another_key_nor_an_urgent_request(start: Start, tmp_path: Path) -> None:
    keys = KeyFile(tmp_path / "keys")
    keys.write("batch\nother\nboss priority=high\n")
    flags = ("--devices", "cpu", "--stub-step", "200ms", "--api-key-file", str(keys.path))
    daemon = start(*flags, key="observer")
    body = {"prompt": [5] * 20, "max_tokens": 4000, "n": 8, "stream": True}

    def active() -> int:
        return daemon.status()["frontends"][0]["active"]

    with Clients(daemon, [body] * 66, key="batch") as flood:
        wait_for("an answer to the rest", lambda: sum(o.ended for o in flood.outcomes) == 18)
        assert active() == 48 * 8
        assert {outcome.status for outcome in flood.outcomes if outcome.ended} == {429}
        with Clients(daemon, [body] * 2, key="other") as other:
            wait_for("their places", lambda: active() == 50 * 8)
            assert len(complete(daemon, "boss", [5] * 20, n=8)["choices"]) == 8
            other.hang_up()
        flood.hang_up()
    daemon.await_idle()
