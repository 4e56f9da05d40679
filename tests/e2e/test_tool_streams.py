"""Tool calls and reasoning with a real daemon: they outlive frontends that die in their middle, to the byte."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import openai
import pytest

from bench.answers import Answer
from tests.e2e.daemon_process import Daemon
from tests.e2e.raw_client import Client
from tests.e2e.test_succession import CHAT, address, kill

WORDS = " ".join(f"word{i}" for i in range(60))
CALLS = "\n".join(
    f"<tool_call>\n{json.dumps({'name': name, 'arguments': {'text': WORDS, 'n': i}})}\n</tool_call>"
    for i, name in enumerate(("write", "send"))
)
SCRIPT = [
    {"when": "It is done", "say": "<think>\nGood.\n</think>\n\nBoth are done."},
    {"when": "unknown", "say": '<tool_call>{"name": "nothing", "arguments": {}}</tool_call>'},
    {"say": f"<think>\nI write first.\n</think>\n\nI call both.\n{CALLS}"},
]
TOOLS = [{"type": "function", "function": {"name": name}} for name in ("write", "send")]


@pytest.fixture(scope="module")
def daemon(start_shared: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    script: Path = tmp_path_factory.mktemp("script") / "script.json"
    script.write_text(json.dumps(SCRIPT))
    formats = ("--tool-format", "hermes", "--reasoning-format", "think")
    options = ("--script", str(script), "--stub-step", "0.01", *formats)
    return start_shared("--devices", "cpu,cpu", "--no-prefix-caching", *options, engine="script")


def body(**fields: Any) -> dict[str, Any]:
    usage = {"stream_options": {"include_usage": True}} if fields.get("stream", True) else {}
    return {"messages": [{"role": "user", "content": "go"}], "tools": TOOLS, "stream": True} | usage | fields


REQUESTS = {
    "stream": body(),
    "choices": body(n=2),
    "one call": body(parallel_tool_calls=False),
    "no reasoning": body(include_reasoning=False, logprobs=True),
    "no tools": body(tool_choice="none"),
    "whole": body(stream=False),
    "unknown": body(messages=[{"role": "user", "content": "unknown"}]),
}


def ask(daemon: Daemon, name: str) -> Answer:
    with closing(Client(address(daemon))) as client:
        client.send(CHAT, REQUESTS[name])
        answer = client.read()
    assert len(answer.ids) <= 1 and len(set(answer.call_ids)) == len(answer.call_ids)
    answer.ids = set()
    return answer


def test_calls_outlive_frontends_that_die_in_their_middle(daemon: Daemon):
    with ThreadPoolExecutor(len(REQUESTS)) as pool:
        whole = {name: found.result() for name, found in {n: pool.submit(ask, daemon, n) for n in REQUESTS}.items()}
        calls = [["write", json.dumps({"text": WORDS, "n": 0})], ["send", json.dumps({"text": WORDS, "n": 1})]]
        assert dict(whole["stream"].calls) == {0: calls} and whole["stream"].finishes == {0: ["tool_calls"]}
        assert whole["stream"].reasoning == {0: "I write first."} and whole["stream"].texts == {0: "I call both."}
        assert whole["one call"].calls == {0: calls[:1]} and not whole["no reasoning"].reasoning
        assert "<tool_call>" in whole["no tools"].texts[0] and not whole["no tools"].calls
        assert whole["unknown"].texts == {0: SCRIPT[1]["say"]}
        started = {name: pool.submit(ask, daemon, name) for name in REQUESTS}
        for _ in range(2):
            with closing(Client(address(daemon))) as client:  # a stream that is in the middle of its first call
                client.send(CHAT, body())
                client._until(b'"arguments":"{')
                kill(daemon)
        for name, found in started.items():
            assert found.result() == whole[name], name
    daemon.await_idle()


def test_a_stream_that_is_kept_goes_on_in_the_middle_of_a_call(daemon: Daemon):
    from tests.api.test_kept_streams import parse
    from tests.api.test_tools import put_together

    with closing(Client(address(daemon))) as client:
        client.send(CHAT, body(), headers="X-Llumd-Keep: 1\r\n")
        client._until(b'"arguments":"{')
        text = [client._until(b"\n\n") for _ in range(20)][-1]
    id = text.decode().split('"id":"')[1].split('"')[0]
    kill(daemon)
    first = parse(daemon.get(f"/v1/streams/{id}").text)
    expected = put_together([event for _, event in first if event])
    assert [call["function"]["name"] for call in expected["tool_calls"]] == ["write", "send"]
    for cut in (1, 5, len(first) // 2, len(first) - 3):
        rest = parse(daemon.get(f"/v1/streams/{id}", **{"Last-Event-ID": first[cut - 1][0]}).text)
        assert put_together([event for _, event in first[:cut] + rest if event]) == expected, first[cut - 1][0]


def test_a_tool_loop_with_the_official_client(daemon: Daemon):
    client = openai.OpenAI(base_url=f"{daemon.url}/v1", api_key="any", max_retries=0)
    model = client.models.list().data[0].id
    messages: list[Any] = [{"role": "user", "content": "go"}]
    for _ in range(2):
        with client.chat.completions.stream(model=model, messages=messages, tools=TOOLS) as stream:
            answer = stream.get_final_completion().choices[0].message
        messages.append(answer.model_dump(exclude_none=True, exclude={"parsed"}))
        messages += [
            {"role": "tool", "tool_call_id": call.id, "content": "It is done."} for call in answer.tool_calls or []
        ]
    assert len(messages) == 5 and answer.content == "Both are done."
    assert (answer.model_extra or {})["reasoning_content"] == "Good."
