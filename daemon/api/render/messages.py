"""Renders an answer as a message of Anthropic's Messages API: content blocks, and an event for each piece of one."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

from daemon.api.errors import ApiError, ErrorShape
from daemon.api.parse.parts import Block, Call, CallArguments, CallBegin, Part, Reasoning, Text, blocks
from daemon.api.render.answer import Answer
from daemon.api.render.renderer import Renderer
from daemon.ipc.messages import Finish

_DELTA = b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,"delta":{"type":%b:%b}}\n\n'
PING = b'event: ping\ndata: {"type":"ping"}\n\n'

_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_json = msgspec.json.Encoder().encode


class MessageFacts(msgspec.Struct, array_like=True, frozen=True):
    """What only this renderer must know of a request."""

    max_tokens: int


_facts = msgspec.msgpack.Decoder(MessageFacts).decode


class _MessagesErrors:
    """``{"type": "error", "error": {"type", "message", "details": {"error_code"}}, "request_id"}``"""

    def body(self, error: ApiError) -> dict[str, Any]:
        kind = _ERROR_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
        message = error.message
        if error.param and f"`{error.param}`" not in message:  # there is no other place for it
            message = f"{error.param}: {message}"
        detail: dict[str, Any] = {"type": kind, "message": message}
        if error.code:
            detail["details"] = {"error_code": error.code}
        return {"type": "error", "error": detail, "request_id": error.request_id or None}

    def event(self, error: ApiError) -> bytes:
        return _event("error", {"error": self.body(error)["error"]})


MESSAGES_ERRORS: ErrorShape = _MessagesErrors()


class MessagesRenderer(Renderer):
    """Writes the one choice of an answer. Parts of one kind in a row are one content block.

    The signature of a block of thinking is there because clients expect one. It is never checked.
    """

    errors = MESSAGES_ERRORS

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer)
        self._facts = _facts(answer.form.extra)
        self._num_blocks = 0  # that have begun
        self._open: Part | None = None  # the first part of the open block

    def write_begin(self, index: int, out: list[bytes]) -> None:
        out.append(_event("message_start", {"message": self._message([], None, None)}))

    def write_parts(self, index: int, parts: list[Part], out: list[bytes]) -> None:
        for part in parts:
            if isinstance(part, CallBegin) or not _continues(part, self._open):
                self._close(out)
                self._begin(part, out)
            match part:
                case Text(text):
                    self._delta(b'"text_delta","text"', text, out)
                case Reasoning(text):
                    self._delta(b'"thinking_delta","thinking"', text, out)
                case CallArguments(_, text):
                    self._delta(b'"input_json_delta","partial_json"', text, out)
        if self.answer.choices[index].finish:
            self._close(out)

    def write_end(self, out: list[bytes]) -> None:
        reason, sequence = self._stop()
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        out.append(_event("message_delta", {"delta": delta, "usage": self._usage()}))
        out.append(_event("message_stop", {}))

    def whole(self, parts: list[list[Part]]) -> dict[str, Any]:
        content = [self._block(block, i) for i, block in enumerate(blocks(parts[0]))]
        return self._message(content, *self._stop())

    # -- blocks -------------------------------------------------------------------------------------

    def _begin(self, part: Part, out: list[bytes]) -> None:
        self._open = part
        block: dict[str, Any]
        match part:
            case Text():
                block = {"type": "text", "text": ""}
            case Reasoning():
                block = {"type": "thinking", "thinking": "", "signature": ""}
            case CallBegin(_, id, name):
                block = {"type": "tool_use", "id": id, "name": name, "input": {}}
            case CallArguments():
                raise AssertionError("arguments of a call that has not begun")
        out.append(_event("content_block_start", {"index": self._num_blocks, "content_block": block}))
        self._num_blocks += 1

    def _delta(self, kind: bytes, text: str, out: list[bytes]) -> None:
        head = (
            b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,"delta":{"type":%b:%b}}\n\n'
        )
        out.append(head % (self._num_blocks - 1, kind, _json(text)))

    def _close(self, out: list[bytes]) -> None:
        if self._open is None:
            return
        index = self._num_blocks - 1
        if isinstance(self._open, Reasoning):
            delta = {"type": "signature_delta", "signature": self._signature(index)}
            out.append(_event("content_block_delta", {"index": index, "delta": delta}))
        out.append(_event("content_block_stop", {"index": index}))
        self._open = None

    def _block(self, block: Block, index: int) -> dict[str, Any]:
        match block:
            case Text(text):
                return {"type": "text", "text": text}
            case Reasoning(text):
                return {"type": "thinking", "thinking": text, "signature": self._signature(index)}
            case Call(_, id, name, arguments):
                return {"type": "tool_use", "id": id, "name": name, "input": _input(arguments)}

    def _signature(self, index: int) -> str:
        return hashlib.blake2b(f"{self.answer.id}/{index}".encode(), digest_size=16).hexdigest()

    # -- the message --------------------------------------------------------------------------------

    def _message(self, content: list[dict[str, Any]], reason: str | None, sequence: str | None) -> dict[str, Any]:
        answer = self.answer
        head = {"id": answer.id, "type": "message", "role": "assistant", "model": answer.model}
        return head | {
            "content": content,
            "stop_reason": reason,
            "stop_sequence": sequence,
            "usage": self._usage(),
        }

    def _stop(self) -> tuple[str, str | None]:
        """Return why the answer has ended, and the stop sequence that ended it."""
        choice = self.answer.choices[0]
        if choice.stop_string is not None:
            return "stop_sequence", choice.stop_string
        if choice.finish is Finish.LENGTH:
            full = choice.num_tokens < self._facts.max_tokens
            return "model_context_window_exceeded" if full else "max_tokens", None
        return "tool_use" if choice.num_calls else "end_turn", None

    def _usage(self) -> dict[str, Any]:
        """Return the token counts so far. Those from a prefix cache count apart."""
        answer = self.answer
        prompt, output = answer.num_tokens()
        return {
            "input_tokens": prompt - answer.num_cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": answer.num_cached_tokens,
            "output_tokens": output,
            "output_tokens_details": {"thinking_tokens": answer.num_reasoning_tokens},
            "service_tier": "standard",
        }


def _continues(part: Part, first: Part | None) -> bool:
    if isinstance(part, CallArguments):
        return isinstance(first, CallBegin)
    return type(part) is type(first)


def _input(arguments: str) -> Any:
    """Return the arguments of a call as they are written; {} if they end in the middle."""
    try:
        msgspec.json.decode(arguments, type=dict[str, msgspec.Raw])
    except msgspec.DecodeError:
        return {}
    return msgspec.Raw(arguments)


def _event(kind: str, members: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), _json({"type": kind} | members))
