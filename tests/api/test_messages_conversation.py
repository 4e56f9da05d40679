"""The messages of a chat that a Messages request becomes."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from daemon.api.errors import ApiError
from daemon.api.messages.conversation import to_messages
from daemon.api.messages.schema import Block, InputMessage

USE = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Rome"}}
CALL = {"id": "t1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value, "cache_control": {"type": "ephemeral"}}


def result(content: Any = None, **more: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": "t1"} | ({} if content is None else {"content": content}) | more


def lowered(messages: list[dict[str, Any]], system: Any = None) -> list[dict[str, Any]]:
    """Return the set members of each message; a list of text parts as a list of their texts."""
    given = msgspec.convert(system, str | list[Block] | None)
    found = []
    for message in to_messages(given, msgspec.convert(messages, list[InputMessage])):
        members = {k: v for k, v in msgspec.structs.asdict(message).items() if v is not None}
        if isinstance(message.content, list):
            members["content"] = [part if isinstance(part, str) else part.text for part in message.content]
        found.append(members)
    return found


@pytest.mark.parametrize(
    ("system", "content"),
    [("Be brief.", "Be brief."), ([text("Be brief.")], "Be brief."), ([text("a"), text("b")], ["a", "b"])],
)
def test_the_system_prompt_is_the_first_message(system: Any, content: Any):
    found = lowered([{"role": "user", "content": "hi"}], system)
    assert found == [{"role": "system", "content": content}, {"role": "user", "content": "hi"}]


def test_a_note_for_accounting_is_no_part_of_the_prompt():
    note = text("x-anthropic-billing-header: cc_version=2.1.197.096; cc_entrypoint=sdk-cli;")
    assert lowered([{"role": "user", "content": "hi"}], [note, text("Be brief.")])[0]["content"] == "Be brief."


@pytest.mark.parametrize("system", [None, "", []])
def test_an_empty_system_prompt_is_none(system: Any):
    assert [m["role"] for m in lowered([{"role": "user", "content": "hi"}], system)] == ["user"]


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        ({"role": "user", "content": [text("a"), text("b")]}, [{"role": "user", "content": ["a", "b"]}]),
        ({"role": "user", "content": []}, [{"role": "user", "content": ""}]),
        ({"role": "system", "content": [text("mid")]}, [{"role": "system", "content": "mid"}]),
        (
            {"role": "assistant", "content": [text("Let me see."), USE]},
            [{"role": "assistant", "content": "Let me see.", "tool_calls": [CALL]}],
        ),
        (
            {"role": "assistant", "content": [USE | {"id": "t2"}]},
            [{"role": "assistant", "tool_calls": [CALL | {"id": "t2"}]}],
        ),
        (
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "x"},
                    {"type": "redacted_thinking", "data": "xyz"},
                    text("Yes."),
                ],
            },
            [{"role": "assistant", "content": "Yes.", "reasoning": "hm"}],
        ),
        # Results come before text: they follow the calls.
        (
            {"role": "user", "content": [text("and now?"), result("sunny")]},
            [
                {"role": "tool", "content": "sunny", "tool_call_id": "t1"},
                {"role": "user", "content": "and now?"},
            ],
        ),
        ({"role": "user", "content": [result()]}, [{"role": "tool", "content": "", "tool_call_id": "t1"}]),
        (
            {"role": "user", "content": [result([text("a"), text("b")], is_error=True)]},
            [{"role": "tool", "content": ["Error:", "a", "b"], "tool_call_id": "t1"}],
        ),
        (
            {"role": "user", "content": [result("no such city", is_error=True)]},
            [{"role": "tool", "content": "Error: no such city", "tool_call_id": "t1"}],
        ),
    ],
)
def test_a_turn_becomes(turn: dict[str, Any], expected: list[dict[str, Any]]):
    assert lowered([turn]) == expected


@pytest.mark.parametrize(
    ("turn", "where", "why"),
    [
        ({"role": "tool", "content": "x"}, "messages.0.role", "must be one of user, assistant, system"),
        (
            {"role": "user", "content": [{"type": "image", "source": {}}]},
            "messages.0.content.0",
            "`image`.*text only",
        ),
        ({"role": "user", "content": [text("a"), {"type": "document"}]}, "messages.0.content.1", "`document`"),
        ({"role": "user", "content": [result([{"type": "image"}])]}, "messages.0.content.0.content.0", "`image`"),
        ({"role": "user", "content": [result({"a": 1})]}, "messages.0.content.0.content", "string or a list"),
        ({"role": "user", "content": [result("x", tool_use_id="")]}, "messages.0.content.0", "tool_use_id"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages.0.content.0", "needs a `text`"),
        (
            {"role": "assistant", "content": [{"type": "server_tool_use", "id": "x"}]},
            "messages.0.content.0",
            "runs no tools",
        ),
        ({"role": "assistant", "content": [USE | {"input": "x"}]}, "messages.0.content.0", "`input`, an object"),
    ],
)
def test_what_cannot_be_a_message_is_refused_by_name(turn: dict[str, Any], where: str, why: str):
    with pytest.raises(ApiError, match=why) as refused:
        lowered([turn])
    assert (refused.value.status, refused.value.param) == (400, where)
