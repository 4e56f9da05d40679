"""A start that cannot succeed is refused before any process starts, with one line that names the cause."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from daemon.ipc.child import EXIT_CONFIG
from tests.e2e.conftest import Start
from tests.e2e.daemon_process import refused


def assert_refused(home: Path, *arguments: str, naming: str) -> None:
    """Assert exit code 78, one line on stderr that contains `naming`, and no socket."""
    code, stderr = refused(home, *arguments)
    assert code == EXIT_CONFIG, stderr
    assert naming in stderr
    assert stderr.startswith("llumd: ")
    assert len(stderr.splitlines()) == 1
    assert not (home / "run" / "admin.sock").exists()


def model_dir(path: Path, config: str | None) -> str:
    path.mkdir()
    if config is not None:
        (path / "config.json").write_text(config)
    return str(path)


@pytest.mark.parametrize(
    ("arguments", "naming"),
    [
        (["--host", "0.0.0.0"], "api_key_file"),
        (["--port", "http"], "port"),
        (["--block-size", "17"], "block_size"),
        (["--kv-memory", "much"], "kv_memory"),
        (["--engine", "steam"], "engine"),
        (["--devices", "gpu"], "devices"),
        (["--devices", "cpu,cuda:0"], "devices"),
        (["--devices", "cuda:63"], "there is no cuda:63"),
        (["--api-key-file", "/nowhere/keys"], "/nowhere/keys"),
        (["/nowhere/model"], "/nowhere/model"),
        (["an-owner/a-model"], "hub"),
    ],
)
def test_bad_settings(home: Path, arguments: list[str], naming: str) -> None:
    assert_refused(home, *arguments, naming=naming)


@pytest.mark.parametrize(
    ("config", "naming"),
    [(None, "config.json"), ("{", "JSON"), (json.dumps({"architectures": ["GPT2LMHeadModel"]}), "GPT2LMHeadModel")],
)
def test_broken_models(home: Path, config: str | None, naming: str) -> None:
    assert_refused(home, model_dir(home / "model", config), naming=naming)


def test_truncated_weights(home: Path) -> None:
    from daemon.models import store

    demo = store.resolve("demo", "auto", print)
    broken = home / "broken"
    broken.mkdir()
    for file in demo.iterdir():
        (broken / file.name).write_bytes(file.read_bytes()[: 1 << 20])
    assert_refused(home, str(broken), naming="safetensors")


def test_unknown_option_in_a_file(home: Path) -> None:
    file = home / "llumd.toml"
    file.write_text("prot = 8000\n")
    assert_refused(home, "--config", str(file), naming="prot")


def test_unknown_flag_is_a_usage_error(home: Path) -> None:
    code, stderr = refused(home, "--prot", "8000")
    assert code == 2
    assert "--prot" in stderr


def test_port_in_use(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert_refused(home, "--engine", "stub", "--port", port, naming=port)


def test_second_daemon_on_one_run_directory(start: Start) -> None:
    daemon = start("--devices", "cpu")
    code, stderr = refused(daemon.home, "--engine", "stub", "--port", "0")
    assert code == EXIT_CONFIG
    assert str(daemon.run_dir) in stderr
    # The first daemon still serves, with its own socket.
    assert daemon.status()["supervisor_pid"] == daemon.process.pid
    assert daemon.complete(max_tokens=1).status_code == 200
