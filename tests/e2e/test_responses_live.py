"""The Responses API with a real daemon: streams outlive their frontend and moves, and a client runs a tool loop."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.api.responses_client import PATH, WEATHER, merged, parse
from tests.e2e.daemon_process import Daemon, wait_for
from tests.e2e.mover import TAKEOVERS
from tests.e2e.sse_reader import KEEP
from tests.e2e.test_succession import kill

CITY = " ".join(f"name{i}" for i in range(60))
CALL = json.dumps({"name": "get_weather", "arguments": {"city": CITY}})
SCRIPT = [
    {"when": "12 degrees", "say": "<think>\nGood.\n</think>\n\nIt is 12 degrees."},
    {"say": f"<think>\nI look first.\n</think>\n\nOne moment.\n<tool_call>\n{CALL}\n</tool_call>"},
]
ASKED: dict[str, Any] = {"input": "How is the weather?", "tools": [WEATHER]}
STREAMED = ASKED | {"stream": True}


@pytest.fixture(scope="module")
def daemon(start_shared: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    script: Path = tmp_path_factory.mktemp("script") / "script.json"
    script.write_text(json.dumps(SCRIPT))
    options = ("--script", str(script), "--stub-step", "0.01", "--tool-format", "hermes")
    formats = ("--reasoning-format", "think", "--no-prefix-caching")
    return start_shared("--devices", "cpu,cpu", *options, *formats, engine="script")


def plain(events: list[dict[str, Any]]) -> Any:
    """Return all that a stream says but its ids and time, which differ between two requests."""
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return without_ids(merged(events))


def without_ids(value: Any) -> Any:
    if isinstance(value, dict):
        names = {"id", "item_id", "call_id", "created_at"}
        return {k: without_ids(v) for k, v in value.items() if k not in names}
    return [without_ids(v) for v in value] if isinstance(value, list) else value


def read(daemon: Daemon, at: int = 0, then: Any = None, headers: dict[str, str] | None = None) -> str:
    """Return a whole stream. After `at` lines with a piece of the arguments call `then`."""
    seen, lines = 0, []
    with httpx.stream("POST", daemon.url + PATH, json=STREAMED, headers=headers or {}, timeout=60) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            lines.append(line)
            seen += line == "event: response.function_call_arguments.delta"
            if then is not None and seen == at:
                then()
                then = None
    assert then is None
    return "\n".join(lines) + "\n"


def events_of(body: str) -> list[dict[str, Any]]:
    return [event for _, event in parse(body)]


def test_a_stream_outlives_its_frontend_and_its_engine(daemon: Daemon):
    unharmed = plain(events_of(read(daemon)))
    kinds = [item["type"] for item in unharmed[-1]["response"]["output"]]
    assert kinds == ["reasoning", "message", "function_call"]
    assert json.loads(unharmed[-1]["response"]["output"][2]["arguments"]) == {"city": CITY}
    with ThreadPoolExecutor(1) as pool:
        whole = pool.submit(httpx.post, daemon.url + PATH, json=ASKED, timeout=60)
        assert plain(events_of(read(daemon, 20, lambda: kill(daemon)))) == unharmed
        assert without_ids(whole.result().json()) == unharmed[-1]["response"]

    def drain() -> None:
        (busy,) = (i for i, row in enumerate(daemon.status()["engines"]) if row["running"])
        assert daemon.ctl("drain", str(busy)).returncode == 0
        wait_for("another engine", lambda: daemon.metric(TAKEOVERS) > moves)
        assert daemon.ctl("undrain", str(busy)).returncode == 0

    moves = daemon.metric(TAKEOVERS)
    assert plain(events_of(read(daemon, 20, drain))) == unharmed


def test_a_kept_stream_is_read_on_after_the_death_of_its_frontend(daemon: Daemon):
    first = parse(read(daemon, 20, lambda: kill(daemon), KEEP))
    unharmed = plain([event for _, event in first])
    id = first[0][1]["response"]["id"]
    for count in (1, 2, len(first) // 2, len(first) - 3, len(first) - 1):
        got = httpx.get(f"{daemon.url}/v1/streams/{id}", headers={"Last-Event-ID": first[count - 1][0]})
        assert plain([event for _, event in first[:count]] + events_of(got.text)) == unharmed, count


def test_a_tool_loop_with_the_official_client(daemon: Daemon):
    client = openai.OpenAI(base_url=f"{daemon.url}/v1", api_key="any", max_retries=0)
    model = client.models.list().data[0].id
    items: list[Any] = [{"role": "user", "content": "How is the weather?"}]
    texts = []
    for _ in range(2):
        with client.responses.stream(model=model, input=items, tools=[WEATHER]) as stream:  # type: ignore[list-item]
            answer = stream.get_final_response()
        texts.append(answer.output_text)
        items += answer.output
        calls = [item for item in answer.output if item.type == "function_call"]
        items += [{"type": "function_call_output", "call_id": c.call_id, "output": "12 degrees"} for c in calls]
    assert texts == ["One moment.", "It is 12 degrees."]
