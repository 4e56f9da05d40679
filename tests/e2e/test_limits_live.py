"""Limits of a running daemon: full queue, deadline, body size, context length, API keys; it serves on afterwards."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import Start
from tests.e2e.daemon_process import HEADERS, Daemon, wait_for
from tests.e2e.load_client import Clients

QUEUE = 4
LONG = {"prompt": "x", "max_tokens": 200, "stream": True}  # takes 6 seconds, longer than the deadline


@pytest.fixture(scope="module")
def daemon(start_shared: Start) -> Daemon:
    limits = ("--max-queued", str(QUEUE), "--max-body", "4KiB", "--request-deadline", "3s", "--stub-step", "30ms")
    return start_shared(*limits, "--max-model-len", "256")


def error(answer: httpx.Response) -> dict[str, str]:
    """Return the error object of an answer."""
    return answer.json()["error"]


def test_full_queue_is_429_with_retry_after(daemon: Daemon) -> None:
    with Clients(daemon, [LONG] * QUEUE) as clients:
        wait_for("a full queue", lambda: daemon.status()["frontends"][0]["active"] == QUEUE)
        answer = daemon.complete(max_tokens=1)
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert error(answer)["type"] == "rate_limit_error"
        assert daemon.complete(max_tokens=1, priority="high").status_code == 200  # from the reserve
        clients.hang_up()
    daemon.await_idle()
    assert daemon.complete(max_tokens=1).status_code == 200


def test_deadline_ends_an_answer_and_frees_its_memory(daemon: Daemon) -> None:
    with Clients(daemon, [LONG, LONG | {"stream": False}]) as clients:
        streamed, whole = clients.join()
    assert streamed.text
    assert streamed.failed_cleanly
    assert streamed.errors[0]["code"] == "deadline_exceeded"
    assert whole.status == 504
    assert whole.body["error"]["code"] == "deadline_exceeded"
    daemon.await_idle()


@pytest.mark.parametrize("chunked", [False, True])
def test_large_body_is_413(daemon: Daemon, chunked: bool) -> None:
    body = b'{"prompt": "' + b"x" * 8192 + b'"}'
    answer = httpx.post(f"{daemon.url}/v1/completions", content=iter([body]) if chunked else body, headers=HEADERS)
    assert answer.status_code == 413
    assert "error" in answer.json()


@pytest.mark.parametrize(("prompt", "output"), [([5] * 255, 2), ([5] * 300, 1), ([5], 256)])
def test_too_long_for_the_context_is_400(daemon: Daemon, prompt: list[int], output: int) -> None:
    answer = daemon.complete(prompt, max_tokens=output)
    assert answer.status_code == 400
    assert error(answer)["code"] == "context_length_exceeded"


def test_the_whole_context_is_usable(daemon: Daemon) -> None:
    answer = daemon.complete([5] * 240, max_tokens=16)
    assert answer.status_code == 200
    assert answer.json()["usage"]["total_tokens"] == 256


def test_api_keys(start: Start, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("first-key-of-a-client\nsecond-key-of-a-client\n")
    keys.chmod(0o600)
    daemon = start("--api-key-file", str(keys), "--devices", "cpu", key="second-key-of-a-client")
    assert daemon.get("/health").status_code == 200
    assert daemon.get("/health/ready").status_code == 200
    for path in ("/v1/models", "/metrics", "/nothing"):
        assert daemon.get(path).status_code == 401
    assert daemon.complete(max_tokens=1).status_code == 401
    assert daemon.get("/v1/models", Authorization="Bearer wrong").status_code == 401
    for key in ("first", "second"):
        assert daemon.get("/v1/models", Authorization=f"Bearer {key}-key-of-a-client").status_code == 200
