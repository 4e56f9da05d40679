"""The Messages API with a real daemon: streams outlive their frontend and moves, and a client runs a tool loop."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest

from tests.api.test_anthropic_messages import MESSAGES, WEATHER, events, folded
from tests.e2e.daemon_process import Daemon, wait_for
from tests.e2e.mover import TAKEOVERS
from tests.e2e.test_succession import kill

CITY = " ".join(f"name{i}" for i in range(60))
CALL = json.dumps({"name": "weather", "arguments": {"city": CITY}})
SCRIPT = [
    {"when": "12 degrees", "say": "<think>\nGood.\n</think>\n\nIt is 12 degrees."},
    {"say": f"<think>\nI look first.\n</think>\n\nOne moment.\n<tool_call>\n{CALL}\n</tool_call>"},
]
ASKED: dict[str, Any] = {
    "max_tokens": 1000,
    "messages": [{"role": "user", "content": "How is the weather?"}],
    "tools": [WEATHER],
}


@pytest.fixture(scope="module")
def daemon(start_shared: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    script: Path = tmp_path_factory.mktemp("script") / "script.json"
    script.write_text(json.dumps(SCRIPT))
    options = ("--script", str(script), "--stub-step", "0.01", "--tool-format", "hermes")
    formats = ("--reasoning-format", "think", "--no-prefix-caching")
    return start_shared("--devices", "cpu,cpu", *options, *formats, engine="script")


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    blocks = [{k: v for k, v in block.items() if k not in ("id", "signature")} for block in message["content"]]
    return message | {"id": "", "content": blocks}


def read(daemon: Daemon, then: Callable[[], None] | None = None) -> dict[str, Any]:
    """Return the message of a stream. After 20 pieces of the arguments call `then`."""
    seen, lines = 0, []
    with httpx.stream("POST", daemon.url + MESSAGES, json=ASKED | {"stream": True}, timeout=60) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            lines.append(line)
            seen += "input_json_delta" in line
            if then is not None and seen == 20:
                then()
                then = None
    assert then is None
    return without_ids(folded(events("\n".join(lines) + "\n")))


def test_a_stream_outlives_its_frontend_and_its_engine(daemon: Daemon):
    unharmed = read(daemon)
    assert [block["type"] for block in unharmed["content"]] == ["thinking", "text", "tool_use"]
    assert unharmed["content"][2]["input"] == {"city": CITY} and unharmed["stop_reason"] == "tool_use"
    with ThreadPoolExecutor(1) as pool:
        whole = pool.submit(httpx.post, daemon.url + MESSAGES, json=ASKED, timeout=60)
        assert read(daemon, lambda: kill(daemon)) == unharmed
        assert without_ids(whole.result().json()) == unharmed

    def drain() -> None:
        (busy,) = (i for i, row in enumerate(daemon.status()["engines"]) if row["running"])
        assert daemon.ctl("drain", str(busy)).returncode == 0
        wait_for("another engine", lambda: daemon.metric(TAKEOVERS) > moves)
        assert daemon.ctl("undrain", str(busy)).returncode == 0

    moves = daemon.metric(TAKEOVERS)
    assert read(daemon, drain) == unharmed


def test_a_tool_loop_with_the_official_client(daemon: Daemon):
    asked = []

    @anthropic.beta_tool
    def weather(city: str) -> str:
        """Tells the weather."""
        asked.append(city)
        return "12 degrees"

    client = anthropic.Anthropic(base_url=daemon.url, api_key="any", max_retries=0)
    model = httpx.get(f"{daemon.url}/v1/models").json()["data"][0]["id"]
    last = client.beta.messages.tool_runner(
        model=model, max_tokens=1000, messages=ASKED["messages"], tools=[weather]
    ).until_done()
    assert asked == [CITY]
    assert [block.type for block in last.content] == ["thinking", "text"]
    assert last.content[1].text == "It is 12 degrees."
