"""From the input of a Responses request to the messages of a chat. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from daemon.api.errors import ApiError, bad_request
from daemon.api.responses.schema import InputItem, InputPart
from daemon.api.responses.tools import full_name
from daemon.api.schemas import ContentPart, Message

ROLES = ("user", "assistant", "system", "developer")
_TEXTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")


def to_messages(instructions: str | None, input: str | list[InputItem]) -> list[Message]:
    """Return the messages of a chat. Raises ApiError (400) that names the item for what a chat cannot say.

    The reasoning, the text and the calls of one turn of the assistant are several items, and become one message.
    """
    conversation = _Conversation()
    if instructions:
        conversation.messages.append(Message(role="system", content=instructions))
    if isinstance(input, str):
        conversation.messages.append(Message(role="user", content=input))
    else:
        for i, item in enumerate(input):
            conversation.add(item, f"input[{i}]")
        conversation.end_turn()
    if not conversation.messages:
        raise bad_request("`input` has no text.", "input")
    return conversation.messages


class _Conversation:
    """The messages so far. `add` the items in their order, then `end_turn`."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self._turn: Message | None = None  # the assistant's, which further items may join
        self._reasoning: list[str] = []  # for the next item of the turn

    def add(self, item: InputItem, where: str) -> None:
        match item.type or "message":
            case "message":
                self._add_message(item, where)
            case "reasoning":
                self._add_reasoning(item, where)
            case "function_call":
                self._add_call(item, where)
            case "function_call_output":
                self._add_output(item, where)
            case other:
                raise _unsupported_item(other, where)

    def end_turn(self) -> None:
        """The next item begins another turn."""
        if self._reasoning:
            message = self._assistant()
            if message.content is None and not message.tool_calls:
                message.content = ""
        self._turn = None

    def _add_message(self, item: InputItem, where: str) -> None:
        if item.role not in ROLES:
            raise bad_request(f"`{where}.role` must be one of {', '.join(ROLES)}.", f"{where}.role")
        if item.content is None:
            raise bad_request(f"`{where}` needs `content`.", f"{where}.content")
        content = _content(item.content, f"{where}.content")
        if item.role == "assistant":
            self._add_text(content)
            return
        self.end_turn()
        self.messages.append(Message(role=item.role, content=content))

    def _add_text(self, content: str | list[str | ContentPart]) -> None:
        if self._turn is not None and self._turn.content is not None:
            self.end_turn()
        self._assistant().content = content

    def _add_reasoning(self, item: InputItem, where: str) -> None:
        content = item.content if isinstance(item.content, list) else []
        parts = content or item.summary or []  # a summary says the same in fewer words
        texts = [_text(part, where) for part in parts]
        if item.encrypted_content and not any(texts):
            message = f"`{where}` has only `encrypted_content`, which this server cannot read. Leave the item out."
            raise bad_request(message, f"{where}.encrypted_content", "unsupported_parameter")
        self._reasoning += [text for text in texts if text]

    def _add_call(self, item: InputItem, where: str) -> None:
        for name, value in (("call_id", item.call_id), ("name", item.name)):
            if not value:
                raise bad_request(f"`{where}` needs `{name}`.", f"{where}.{name}")
        _check_arguments(item.arguments, f"{where}.arguments")
        call = {
            "id": item.call_id,
            "type": "function",
            "function": {"name": full_name(item.namespace, item.name or ""), "arguments": item.arguments},
        }
        message = self._assistant()
        if message.tool_calls is None:
            message.tool_calls = []
        message.tool_calls.append(call)

    def _add_output(self, item: InputItem, where: str) -> None:
        if not item.call_id:
            raise bad_request(f"`{where}` needs `call_id`.", f"{where}.call_id")
        try:
            output = msgspec.convert(item.output, str | list[InputPart])
        except msgspec.ValidationError:
            message = f"`{where}.output` must be a string or a list of parts with a `type`."
            raise bad_request(message, f"{where}.output") from None
        self.end_turn()
        content = _content(output, f"{where}.output")
        self.messages.append(Message(role="tool", content=content, tool_call_id=item.call_id))

    def _assistant(self) -> Message:
        """Return the message of this turn, with the reasoning that is there for it."""
        if self._turn is None:
            self._turn = Message(role="assistant", content=None)
            self.messages.append(self._turn)
        if self._reasoning:
            before = [self._turn.reasoning] if self._turn.reasoning else []
            self._turn.reasoning = "\n".join([*before, *self._reasoning])
            self._reasoning = []
        return self._turn


def _content(content: str | list[InputPart], where: str) -> str | list[str | ContentPart]:
    if isinstance(content, str):
        return content
    texts = [_text(part, f"{where}[{j}]") for j, part in enumerate(content)]
    return texts[0] if len(texts) == 1 else [ContentPart(type="text", text=text) for text in texts]


def _text(part: InputPart, where: str) -> str:
    if part.type == "refusal":
        return part.refusal or ""
    if part.type not in _TEXTS:
        message = f"`{where}` has the type {part.type[:64]!r}; only text is supported: this model reads nothing else."
        raise bad_request(message, where, "unsupported_parameter")
    if part.text is None:
        raise bad_request(f"`{where}` needs `text`.", where)
    return part.text


def _check_arguments(arguments: Any, where: str) -> None:
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments) if arguments.strip() else {}
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            arguments = ""
    if not isinstance(arguments, dict | None):
        raise bad_request(f"`{where}` must be the text of a JSON object.", where)


def _unsupported_item(kind: str, where: str) -> ApiError:
    known = "message, function_call, function_call_output and reasoning"
    advice = f"Items here are of type {known}."
    if kind == "item_reference":
        advice = "This server stores no items. Send the item itself, as clients with `store: false` do."
    return bad_request(f"`{where}` has the type {kind[:64]!r}. {advice}", f"{where}.type", "unsupported_parameter")
