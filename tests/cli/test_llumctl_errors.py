"""The arguments of `llumctl`, and its errors without a daemon: text, JSON and exit codes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from daemon.cli import admin_client, llumctl

COMMANDS = (
    *("status", "top", "requests", "cancel", "migrate", "priority", "drain", "undrain", "park", "wake"),
    *("events", "rebalance", "config", "reload"),
)
PYTHONS_WORDS = ("invalid literal", "invalid int", "invalid float", "Extra data", "Errno", "Traceback", "None")


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    """Return exit code, standard output and standard error of a command."""
    with pytest.raises(SystemExit) as e:
        llumctl.main(args)
    out, err = capsys.readouterr()
    assert not any(word in out + err for word in PYTHONS_WORDS)
    return int(e.value.code or 0), out, err


WRONG = [
    ((), "usage", 2),
    (("nonsense",), "usage", 2),
    (("status", "more"), "usage", 2),
    (("drain",), "usage", 2),
    (("drain", "x"), "usage", 2),
    (("drain", "9" * 20), "usage", 2),
    (("drain", "0", "--within", "soon"), "usage", 2),
    (("drain", "0", "--within", "1s", "--no-wait"), "usage", 2),
    (("migrate", "a", "--to", "x"), "usage", 2),
    (("cancel", ""), "usage", 2),
    (("priority", "a", ""), "usage", 2),
    (("top", "--interval", "nan"), "usage", 2),
    (("events", "--kind", "nonsense"), "usage", 2),
    (("status", "--run-dir", ""), "usage", 2),
    (("status", "--socket", "x" * 200), "bad_socket", 1),
    (("status", "--run-dir", "/dev/null"), "bad_socket", 1),
    (("status", "--socket", "/nonexistent"), "not_running", 3),
    (("top", "--socket", "/nonexistent"), "not_running", 3),
    (("events", "--follow", "--socket", "/nonexistent"), "not_running", 3),
    (("wake", "0", "--socket", "/nonexistent"), "not_running", 3),
]


@pytest.mark.parametrize(("args", "code", "exit_code"), WRONG)
def test_every_error_is_text_on_stderr_or_json_on_stdout(
    capsys: pytest.CaptureFixture[str], args: tuple[str, ...], code: str, exit_code: int
):
    status, out, err = run(capsys, *args)
    assert (status, out) == (exit_code, "")
    *usage, last = err.splitlines()
    assert last.startswith("llumctl: ")
    assert bool(usage) == (code == "usage")
    status, out, err = run(capsys, *args, "--json")
    assert (status, err) == (exit_code, "")
    answer = json.loads(out)
    assert answer["code"] == code
    assert answer["error"] == last.removeprefix("llumctl: ")


def test_a_socket_without_a_daemon_and_one_without_permission(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    path = tmp_path / "admin.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        assert run(capsys, "status", "--run-dir", str(tmp_path))[0] == 3  # left by a daemon that was killed
        listener.listen()
        path.chmod(0)
        if os.geteuid() != 0:
            status, out, _ = run(capsys, "status", "--json", "--run-dir", str(tmp_path))
            assert (status, json.loads(out)["code"]) == (1, "no_permission")


def test_another_service_on_the_socket_is_no_daemon(tmp_path: Path):
    """The answer is no HTTP. The last line must be llumctl's, without Python's words."""
    path = tmp_path / "admin.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        command = [sys.executable, "-m", "daemon.cli.llumctl", "--socket", str(path), "cancel", "a"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            with listener.accept()[0] as connection:
                connection.sendall(b"220 mail.example ready\r\n")
            assert process.stderr is not None
            assert "the answer is incomplete" in process.stderr.read()
        assert process.returncode == 1


def test_a_busy_socket_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With a full backlog the kernel refuses a connection at once, with EAGAIN."""
    monkeypatch.setattr("daemon.cli.admin_client.TIMEOUT", 0.3)
    path = tmp_path / "admin.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(0)
        clients = [socket.socket(socket.AF_UNIX) for _ in range(2)]
        for client in clients:
            client.setblocking(False)
            client.connect_ex(str(path))
        with pytest.raises(admin_client.NoAnswer) as e:
            admin_client.call(path, "GET", "/v1/status")
        assert (e.value.code, e.value.exit_code) == ("no_answer", 4)
        for client in clients:
            client.close()


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_every_command(capsys: pytest.CaptureFixture[str], name: str):
    status, text, _ = run(capsys, name, "--help")
    usage, description, *_ = text.split("\n\n")
    assert status == 0
    assert usage.startswith(f"usage: llumctl {name} ")
    assert description[0].isupper() and description.endswith(".")
    for option in ("--json", "--run-dir DIR", "--socket PATH"):
        assert option in text
    _, overview, _ = run(capsys, "--help")
    assert f" {name} " in overview


def test_the_version(capsys: pytest.CaptureFixture[str]):
    status, text, _ = run(capsys, "--version")
    assert status == 0
    assert text.startswith("llumctl ")


@pytest.mark.parametrize("form", ["", "--json"])
def test_output_that_cannot_be_written_is_one_line(form: str):
    command = f"{sys.executable} -m daemon.cli.llumctl status --socket /nonexistent {form} >/dev/full"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    wanted = "cannot write the output: No space left on device" if form else "llumd is not running"
    assert wanted in done.stderr and len(done.stderr.splitlines()) == 1
    assert done.returncode == (1 if form else 3)
