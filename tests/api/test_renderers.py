"""What every renderer keeps: events with ids at any cut, and a replay that ends where the first writer was."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.api.event_ids import END, BadEventId, Journaled, Point, Step, event_id, point_after, step_id
from daemon.api.parse.parts import Part, Text, blocks
from daemon.api.render import apis
from daemon.api.render.renderer import Renderer
from daemon.api.response_facts import EVENTS, USAGE_SENT, choice_word
from daemon.ipc.messages import Finish
from tests.api import responses_client
from tests.api.harness import TEXT, Model, make_api, with_client

KEEP = {"X-Llumd-Keep": "1"}


class Spelled(Renderer):
    """Writes each character as a numbered event of its own, and repeats the whole text at the end."""

    def __init__(self, answer: Any) -> None:
        super().__init__(answer)
        self._texts = ["" for _ in answer.choices]

    def write_begin(self, index: int, out: list[bytes]) -> None:
        out += [self._event("created", index), self._event("in_progress", index)]

    def write_parts(self, index: int, parts: list[Part], out: list[bytes]) -> None:
        text = "".join(part.text for part in parts if isinstance(part, Text))
        self._texts[index] += text
        out += [self._event("character", index, char) for char in text]
        if self.answer.choices[index].finish:
            out += [self._event("text", index, self._texts[index]), self._event("done", index)]

    def write_end(self, out: list[bytes]) -> None:
        out += [self._event("usage", self.answer.usage()), self._event("completed")]

    def whole(self, parts: list[list[Part]]) -> dict[str, Any]:
        return {"texts": [[block.text for block in blocks(found) if isinstance(block, Text)] for found in parts]}

    def _event(self, *data: Any) -> bytes:
        return b"data: " + msgspec.json.encode([self.next_number(), *data]) + b"\n\n"


@pytest.fixture(autouse=True)
def spelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(apis.APIS, "completion", apis.COMPLETION._replace(renderer=Spelled))


def parse(body: str) -> list[tuple[str, Any]]:
    """Return (id, data) of each event."""
    found = []
    for event in body.split("\n\n"):
        if event and not event.startswith(":"):
            fields = dict(line.split(": ", 1) for line in event.split("\n"))
            found.append((fields["id"], json.loads(fields["data"])))
    return found


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 2), st.sampled_from([None, ["fox j"], ["🙂"]]), st.sampled_from([1, 4, 100]), st.data())
def test_a_kept_stream_goes_on_after_any_event(model: Model, n: int, stop: Any, chunk_size: int, data: Any):
    api = make_api(model)
    api.generator.chunk_size = chunk_size
    options = {"stream_options": {"include_usage": True}, "stream": True, "n": n, "stop": stop, "max_tokens": 60}

    async def run(client: Any) -> None:
        response = await client.post(TEXT, json={"prompt": "x"} | options, headers=KEEP)
        stream = response.headers["X-Llumd-Stream"]
        events = parse(await response.text())
        ids = [id for id, _ in events]
        assert len(set(ids)) == len(ids)
        assert [number for _, (number, *_) in events] == list(range(len(events)))
        for i in {0, len(events) - 1, *data.draw(st.sets(st.integers(0, len(events) - 1), max_size=8))}:
            rest = await client.get(f"/v1/streams/{stream}", headers={"Last-Event-ID": ids[i]})
            again = [event for _, event in parse(await rest.text())]
            left = [event for _, event in events[i + 1 :]]
            assert _in_order(again, left) == left

    with_client(api, run)


def _in_order(found: list[Any], expected: list[Any]) -> list[Any]:
    """Return the events as they were first sent: those of one choice keep their order, and numbers go on."""
    first = expected[0][0] if expected else 0
    assert [number for number, *_ in found] == list(range(first, first + len(found)))
    by_choice: dict[Any, list[Any]] = {}
    for _, *event in found:
        by_choice.setdefault(_choice(event), []).append(event)
    return [[data[0], *by_choice[_choice(data[1:])].pop(0)] for data in expected]


def _choice(event: list[Any]) -> Any:
    return event[1] if event[0] in ("created", "in_progress", "character", "text", "done") else None


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from([responses_client.TURN, responses_client.THOUGHT, "plain text", ""]),
    st.sampled_from([1, 4, 400]),
    st.sampled_from([None, 30]),
    st.booleans(),
    st.data(),
)
def test_a_kept_response_goes_on_after_any_event(
    model: Model, text: str, chunk_size: int, limit: int | None, logprobs: bool, data: Any
):
    api = responses_client.agent_api(model, text)
    api.generator.chunk_size = chunk_size
    body: dict[str, Any] = {"input": "x", "stream": True, "max_output_tokens": limit}
    body |= {"include": ["message.output_text.logprobs"]} if logprobs else {"tools": [responses_client.WEATHER]}

    async def run(client: Any) -> None:
        response = await client.post(responses_client.PATH, json=body, headers=KEEP)
        events = responses_client.parse(await response.text())
        ids = [id for id, _ in events]
        assert len(set(ids)) == len(ids)
        for i in {0, len(events) - 1, *data.draw(st.sets(st.integers(0, len(events) - 1), max_size=6))}:
            stream = response.headers["X-Llumd-Stream"]
            rest = await client.get(f"/v1/streams/{stream}", headers={"Last-Event-ID": ids[i]})
            again = [event for _, event in responses_client.parse(await rest.text())]
            assert [event["sequence_number"] for event in again] == list(range(i + 1, i + 1 + len(again)))
            both = [event for _, event in events[: i + 1]] + again
            assert responses_client.merged(both) == responses_client.merged([event for _, event in events])

    with_client(api, run)


def test_a_whole_answer(model: Model):
    async def run(client: Any) -> None:
        whole = await (await client.post(TEXT, json={"prompt": "x", "max_tokens": 4})).json()
        assert whole == {"texts": [["the quick bro"]]}

    with_client(make_api(model), run)


RUNNING = Journaled(17, Finish.NONE)
ENDED = Journaled(17, Finish.STOP)


@pytest.mark.parametrize(
    ("before", "step", "id"),
    [
        ([0, 0], Step(0, choice_word(0, Finish.NONE), 1), "n~0.0.1"),
        ([5 << EVENTS, choice_word(3, Finish.NONE)], Step(0, choice_word(9, Finish.NONE), 2), "3@5~0.9.2"),
        ([0, choice_word(3, Finish.NONE)], Step(0, choice_word(17, Finish.STOP), 7), "3~0.e.7"),
        ([8 << EVENTS, choice_word(17, Finish.STOP)], Step(END, 0, 1), "e@8~u.1"),
    ],
)
def test_the_id_inside_a_step(before: list[int], step: Step, id: str):
    assert step_id(before, step) == id
    assert point_after(id, [ENDED], usage=True) == Point(before, step)


@pytest.mark.parametrize(
    "id", ["3~0", "3~1.4.1", "3~0.18.1", "3~0.4.x", "3~0.e.1", "3~u.1", "3@x", "3@1~0.4.1234567890", "3~0.4.1.2"]
)
def test_other_ids_are_refused(id: str):
    with pytest.raises(BadEventId):
        point_after(id, [RUNNING], usage=False)


def test_the_number_of_events_is_in_the_id():
    state = [USAGE_SENT | 12 << EVENTS, choice_word(17, Finish.STOP)]
    assert event_id(state) == "u@12"
    assert point_after("u@12", [ENDED], usage=True) == Point(state)
