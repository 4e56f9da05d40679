"""A start that cannot succeed is refused before any process starts, with one line that names the cause."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from daemon.ipc.child import EXIT_CONFIG
from tests.e2e.conftest import Start
from tests.e2e.daemon_process import Daemon, checked, refused, wait_for
from tests.models.test_text_files import add_token, cut_in_half
from tests.models.tiny_model import make_tiny_llama


def assert_both_refuse(home: Path, *arguments: str, naming: str) -> None:
    """Assert that `llumd serve` refuses as `assert_refused` says, and `llumd check` with the same words."""
    assert_refused(home, *arguments, naming=naming)
    assert checked(home, *arguments) == refused(home, *arguments)


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
        (["--threads", "999"], "threads"),
        (["--max-model-len", "99999"], "8192, the limit of SmolLM2"),
        (["--engine", "stub", "--kv-memory", "15TiB"], "KV cache"),
        (["demo", "--model", "/nowhere"], "'demo' and --model '/nowhere'"),
        (["--api-key-file", "/nowhere/keys"], "/nowhere/keys"),
        (["/nowhere/model"], "/nowhere/model"),
        (["an-owner/a-model"], "HF_HUB_OFFLINE"),
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


def test_text_files_that_the_frontend_cannot_read(home: Path) -> None:
    model = make_tiny_llama(home / "model")
    cut_in_half(model)
    assert_both_refuse(home, str(model), "--devices", "cpu", naming="tokenizer.json cannot be used")


def test_port_in_use(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert_both_refuse(home, "--engine", "stub", "--port", port, naming=port)


@pytest.mark.parametrize(
    ("arguments", "naming"),
    [
        (["--host", "no-such-host.invalid", "--allow-unauthenticated"], "no-such-host.invalid"),
        (["--run-dir", "/proc/1/run"], "/proc/1/run"),
        (["--run-dir", "/tmp/" + "x" * 110], "107 bytes"),
    ],
)
def test_a_check_tries_what_a_start_tries(home: Path, arguments: list[str], naming: str) -> None:
    assert_both_refuse(home, "--engine", "stub", *arguments, naming=naming)


def test_second_daemon_on_one_run_directory(start: Start) -> None:
    daemon = start("--devices", "cpu")
    port = daemon.url.rpartition(":")[2]
    for run in (refused, checked):
        code, stderr = run(daemon.home, "--engine", "stub", "--port", "0")
        assert code == EXIT_CONFIG
        assert f"another llumd uses {daemon.run_dir}" in stderr
        code, stderr = run(daemon.home / "other", "--engine", "stub", "--port", port)
        assert code == EXIT_CONFIG
        assert f"{port} on 127.0.0.1 is in use by another llumd" in stderr
    # The first daemon still serves, with its own socket.
    assert daemon.status()["supervisor_pid"] == daemon.process.pid
    assert daemon.complete(max_tokens=1).status_code == 200


def test_an_added_token_without_an_embedding(home: Path, start: Start) -> None:
    """The model is served, and a prompt with the token is refused alone; then the frontend's files are damaged."""
    model = make_tiny_llama(home / "model")
    add_token(model, "[PAD]", 384)
    daemon = start("--devices", "cpu", "--frontends", "2", model=str(model))
    assert daemon.complete("a", max_tokens=1).status_code == 200
    answer = daemon.complete("a[PAD]", max_tokens=1)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")
    assert daemon.complete("a", max_tokens=1).status_code == 200
    assert_ends_without_frontends(daemon, model)


def assert_ends_without_frontends(daemon: Daemon, model: Path) -> None:
    """Damage the tokenizer, then kill the frontends: each is given up, and the daemon ends with the reason."""
    cut_in_half(model)
    for index in (0, 1):
        daemon.kill("frontend", index)
        if index == 0:
            wait_for("frontend 0 is given up", lambda: daemon.child("frontend", 0)["state"] == "failed")
            assert daemon.complete("a", max_tokens=1).status_code == 200
    assert daemon.wait(30) == EXIT_CONFIG
    assert "tokenizer.json cannot be used" in daemon.log
    assert "no frontend can run" in daemon.log
