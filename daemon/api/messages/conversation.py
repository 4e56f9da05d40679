"""From the system prompt and the turns of a Messages request to the messages of a chat. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from daemon.api.errors import ApiError, bad_request
from daemon.api.messages.schema import Block, InputMessage
from daemon.api.schemas import ContentPart, Message

ROLES = ("user", "assistant", "system")
# A block that a coding agent sends for Anthropic's accounting. It comes first and differs in each session, so no two
# sessions would have a prefix in common.
_BILLING = "x-anthropic-billing-header:"
_ADVICE = {
    "image": "This model reads text only; describe the image.",
    "document": "Send its text in a block of type text.",
    "search_result": "Send its text in a block of type text.",
}
_OTHER_ADVICE = "This server runs no tools of its own; leave the block out."


def to_messages(system: str | list[Block] | None, turns: list[InputMessage]) -> list[Message]:
    """Return the messages of the chat. Raises ApiError (400) that names the block which cannot be one."""
    if isinstance(system, list):
        system = [block for block in system if not (block.text or "").startswith(_BILLING)]
    found = [Message(role="system", content=_content(system, "system"))] if system else []
    for i, turn in enumerate(turns):
        where = f"messages.{i}"
        if turn.role not in ROLES:
            raise bad_request(f"`role` must be one of {', '.join(ROLES)}.", f"{where}.role")
        if turn.role == "assistant" and not isinstance(turn.content, str):
            found.append(_answer(turn.content, f"{where}.content"))
        elif turn.role == "user" and not isinstance(turn.content, str):
            found += _input(turn.content, f"{where}.content")
        else:
            found.append(Message(role=turn.role, content=_content(turn.content, f"{where}.content")))
    return found


def _content(content: str | list[Block], where: str) -> str | list[Any]:
    """Return text as it is, and blocks as parts; one block as its text."""
    if isinstance(content, str):
        return content
    texts = [_text(block, f"{where}.{j}") for j, block in enumerate(content)]
    return texts[0] if len(texts) == 1 else [ContentPart(text=text) for text in texts]


def _text(block: Block, where: str) -> str:
    if block.type != "text":
        raise _refused(block, where)
    if block.text is None:
        raise bad_request("A block of type text needs a `text`.", where)
    return block.text


def _refused(block: Block, where: str) -> ApiError:
    advice = _ADVICE.get(block.type, _OTHER_ADVICE)
    return bad_request(f"Blocks of type `{block.type[:100]}` are not supported here. {advice}", where)


def _input(blocks: list[Block], where: str) -> list[Message]:
    """Return the messages of a user's turn: the results of tools first, because they follow the calls."""
    results = [_result(block, f"{where}.{j}") for j, block in enumerate(blocks) if block.type == "tool_result"]
    texts = [_text(block, f"{where}.{j}") for j, block in enumerate(blocks) if block.type != "tool_result"]
    if texts or not results:
        results.append(Message(role="user", content=_parts(texts)))
    return results


def _parts(texts: list[str]) -> str | list[Any]:
    return [ContentPart(text=text) for text in texts] if len(texts) > 1 else "".join(texts)


def _result(block: Block, where: str) -> Message:
    if not block.tool_use_id:
        raise bad_request("A block of type tool_result needs a `tool_use_id`.", where)
    content = block.content
    if content is None:
        content = ""
    elif not isinstance(content, str):
        try:
            content = _content(msgspec.convert(content, list[Block]), f"{where}.content")
        except msgspec.ValidationError:
            raise bad_request("`content` must be a string or a list of blocks.", f"{where}.content") from None
    if block.is_error:  # chat templates know no other way to say it
        content = (
            f"Error: {content}" if isinstance(content, str) else [ContentPart(type="text", text="Error:"), *content]
        )
    return Message(role="tool", content=content, tool_call_id=block.tool_use_id)


def _answer(blocks: list[Block], where: str) -> Message:
    """Return an earlier answer. What it thought without saying so (redacted_thinking) is left out."""
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for j, block in enumerate(blocks):
        match block.type:
            case "thinking":
                thoughts.append(block.thinking or "")
            case "redacted_thinking":
                pass
            case "tool_use":
                calls.append(_call(block, f"{where}.{j}"))
            case _:
                texts.append(_text(block, f"{where}.{j}"))
    content = _parts(texts) if texts or not calls else None
    return Message(role="assistant", content=content, tool_calls=calls or None, reasoning="\n".join(thoughts) or None)


def _call(block: Block, where: str) -> dict[str, Any]:
    if not block.id or not block.name or not isinstance(block.input, dict | None):
        raise bad_request("A block of type tool_use needs `id`, `name` and `input`, an object.", where)
    function = {"name": block.name, "arguments": block.input or {}}
    return {"id": block.id, "type": "function", "function": function}
