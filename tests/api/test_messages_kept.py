"""A kept stream of a message goes on after any of its events, as a successor of its frontend does."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.api.harness import Model, make_api, with_client
from tests.api.test_anthropic_messages import CALL, HELLO, MESSAGES, WEATHER, folded, says

TURN = f"<think>Two of them.</think>I ask. <tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>"


def events(body: str) -> list[tuple[str, Any]]:
    """Return (id, data) of each event."""
    found = []
    for event in body.split("\n\n"):
        if event and not event.startswith(":"):
            fields = dict(line.split(": ", 1) for line in event.split("\n"))
            found.append((fields["id"], json.loads(fields["data"])))
            assert fields["event"] == found[-1][1]["type"]
    return found


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from([TURN, "plain text", "<think>only", ""]),
    st.sampled_from([1, 4, 400]),
    st.sampled_from([30, 500]),
    st.sampled_from([[], ["text"], ["I ask"]]),
    st.data(),
)
def test_a_kept_message_goes_on_after_any_event(
    model: Model, text: str, chunk_size: int, limit: int, stops: list[str], data: Any
):
    api = make_api(model, tool_format="hermes", reasoning_format="think")
    api.generator.chunk_size, api.generator.max_model_len = chunk_size, 2048
    says(api, text)
    request = HELLO | {"stream": True, "max_tokens": limit, "tools": [WEATHER], "stop_sequences": stops}

    async def run(client: Any) -> None:
        response = await client.post(MESSAGES, json=request, headers={"X-Llumd-Keep": "1"})
        stream = response.headers["X-Llumd-Stream"]
        found = events(await response.text())
        ids = [id for id, _ in found]
        assert len(set(ids)) == len(ids)
        message = folded(copy.deepcopy([event for _, event in found]))
        for i in {0, len(found) - 1, *data.draw(st.sets(st.integers(0, len(found) - 1), max_size=8))}:
            rest = events(await (await client.get(f"/v1/streams/{stream}", headers={"Last-Event-ID": ids[i]})).text())
            again = [event for _, event in [*found[: i + 1], *rest]]
            assert folded(copy.deepcopy(again)) == message

    with_client(api, run)
