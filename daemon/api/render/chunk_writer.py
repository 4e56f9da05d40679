"""The bytes of the events of chat and text completions.

All of an event but its text is built once per choice, because this is the daemon's hottest path.
"""

from __future__ import annotations

from typing import Any

import msgspec

from daemon.api.parse.parts import CallArguments, CallBegin, Reasoning

DONE = b"data: [DONE]\n\n"

_json = msgspec.json.Encoder().encode


class ChunkWriter:
    """Encodes the events of one choice. `usage` is the value of an event's usage member, if it has one."""

    __slots__ = ("_chat", "_open", "_tail", "_text_head", "_text_mid", "_text_tail", "_usage")

    def __init__(self, *, chat: bool, id: str, created: int, model: str, index: int, include_usage: bool) -> None:
        self._chat = chat
        head = chunk_head(chat=chat, id=id, created=created, model=model)
        self._open = b'%s"choices":[{"index":%d,' % (head, index)
        self._usage = include_usage
        self._tail = b'}],"usage":null}\n\n' if include_usage else b"}]}\n\n"
        self._text_head = self._open + (b'"delta":{"content":' if chat else b'"text":')
        self._text_mid = (b"}" if chat else b"") + b',"logprobs":'
        self._text_tail = self._text_mid + b'null,"finish_reason":null' + self._tail

    def role(self, usage: Any = None, text: str = "") -> bytes:
        """Return the first event of a chat choice, the only one that names the role."""
        delta = b'"delta":{"role":"assistant","content":%b},"logprobs":null,"finish_reason":null' % _json(text)
        return self._open + delta + self._end(usage)

    def text(self, text: str, logprobs: Any = None, usage: Any = None) -> bytes:
        """Return an event with `text`, encoded as JSON, and the logprobs object of its tokens."""
        if logprobs is None and usage is None:
            return self._text_head + _json(text) + self._text_tail
        middle = self._text_mid + _json(logprobs) + b',"finish_reason":null'
        return self._text_head + _json(text) + middle + self._end(usage)

    def part(self, part: Reasoning | CallBegin | CallArguments, logprobs: Any = None, usage: Any = None) -> bytes:
        """Return the event of a chat for a part that is not text."""
        match part:
            case Reasoning(text):
                delta: dict[str, Any] = {"reasoning_content": text, "reasoning": text}
            case CallBegin(index, id, name):
                function = {"name": name, "arguments": ""}
                delta = {"tool_calls": [{"index": index, "id": id, "type": "function", "function": function}]}
            case CallArguments(index, text):
                delta = {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
        middle = b',"logprobs":%b,"finish_reason":null' % _json(logprobs)
        return self._open + b'"delta":' + _json(delta) + middle + self._end(usage)

    def with_member(self, event: bytes, name: bytes, value: bytes) -> bytes:
        """Return an event of this choice with one more member in the choice. `value`: JSON."""
        return b'%b"%b":%b,%b' % (self._open, name, value, event.removeprefix(self._open))

    def finish(self, reason: str, usage: Any = None) -> bytes:
        """Return the last event of the choice."""
        empty = b'"delta":{}' if self._chat else b'"text":""'
        middle = b',"logprobs":null,"finish_reason":"%s"' % reason.encode()
        return self._open + empty + middle + self._end(usage)

    def _end(self, usage: Any) -> bytes:
        return self._tail if usage is None else b'}],"usage":' + _json(usage) + b"}\n\n"


def chunk_head(*, chat: bool, id: str, created: int, model: str) -> bytes:
    """Return the bytes that all events of an answer begin with."""
    kind = "chat.completion.chunk" if chat else "text_completion"
    common = _json({"id": id, "object": kind, "created": created, "model": model})
    return b"data: " + common[:-1] + b","


def with_top_member(event: bytes, name: bytes, value: bytes) -> bytes:
    """Return an event with one more member beside its choices. `value`: JSON."""
    return b'%b,"%b":%b}\n\n' % (event.removesuffix(b"}\n\n"), name, value)


def usage_chunk(head: bytes, usage: Any) -> bytes:
    """Return the event before [DONE], which has only the totals."""
    return head + b'"choices":[],"usage":' + _json(usage) + b"}\n\n"
