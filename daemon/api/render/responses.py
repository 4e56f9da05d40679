"""Renders an answer as a response of OpenAI's Responses API: items, and typed events with numbers."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Raw

from daemon.api.errors import ApiError
from daemon.api.parse.parts import Call, CallArguments, CallBegin, Part, Text, blocks
from daemon.api.render.answer import Answer
from daemon.api.render.choice import Choice
from daemon.api.render.output_items import (
    COMPLETED,
    IN_PROGRESS,
    INCOMPLETE,
    Event,
    InNamespace,
    MessageItem,
    OutputItem,
    new_item,
)
from daemon.api.render.renderer import Renderer
from daemon.ipc.messages import Finish

FAILED = "failed"
_CODES = {429: "rate_limit_exceeded", 400: "invalid_prompt"}  # of a failed response, by status; others: server_error


class ResponseExtra(msgspec.Struct):
    """`AnswerForm.extra`. `members`: those of the response that repeat its request.

    `namespaces`: of functions that are in one, by the name that the model knows.
    """

    members: dict[str, Any]
    namespaces: dict[str, InNamespace]


class _Extra(ResponseExtra):
    members: dict[str, Raw]


_extra = msgspec.json.Decoder(_Extra).decode


class _Logprobs(msgspec.Struct):
    """The entries that `ChatLogprobs` has written."""

    content: list[Raw]


_logprobs = msgspec.json.Decoder(_Logprobs).decode


class _ResponsesErrors:
    """Bodies as in a chat. In a stream without a response: the event `error`."""

    def body(self, error: ApiError) -> dict[str, Any]:
        return error.body()

    def event(self, error: ApiError) -> bytes:
        fields = {"code": error.code, "message": error.message, "param": error.param}
        return _encode({"type": "error"} | fields, 0)


class ResponsesRenderer(Renderer):
    """Writes the one choice of an answer. `AnswerForm.extra`: an encoded `ResponseExtra`."""

    errors = _ResponsesErrors()

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer)
        extra = _extra(answer.form.extra)
        self._repeated, self._namespaces = extra.members, extra.namespaces
        self._digits = answer.id.rpartition("_")[2]
        self._done: list[dict[str, Any]] = []
        self._item: OutputItem | None = None
        self._logprobs: list[Raw] = []  # of tokens whose text is not written yet
        self._num_logprobs = 0  # entries that are written, or left out

    def write_begin(self, index: int, out: list[bytes]) -> None:
        for kind in ("created", "in_progress"):
            self._write({"type": f"response.{kind}", "response": self._response(IN_PROGRESS)}, out)

    def write_parts(self, index: int, parts: list[Part], out: list[bytes]) -> None:
        choice = self.answer.choices[index]
        self._take_logprobs(choice)
        for part in parts:
            item = self._item_of(part, out)
            if not isinstance(part, CallBegin):
                item.append(part.text)
                self._write(self._with_logprobs(item, item.delta(part.text)), out)
        if choice.finish:
            if not self._done and self._item is None:
                self._item_of(Text(""), out)  # clients expect an item
            self._close(_status(choice), out)

    def write_end(self, out: list[bytes]) -> None:
        response = self._final()
        self._write({"type": f"response.{response['status']}", "response": response}, out)

    def whole(self, parts: list[list[Part]]) -> dict[str, Any]:
        self.write_parts(0, _joined(parts[0]), [])
        return self._final()

    def event(self, error: ApiError) -> bytes:
        out: list[bytes] = []
        self.begin(0, out)  # clients expect it first
        output = [*self._done, *([self._item.body(INCOMPLETE)] if self._item is not None else ())]
        failure = {"code": _CODES.get(error.status, "server_error"), "message": error.message}
        response = self._response(FAILED, output=output, error=failure)
        self._write({"type": "response.failed", "response": response}, out)
        return b"".join(out)

    # -- items --------------------------------------------------------------------------------------

    def _item_of(self, part: Part, out: list[bytes]) -> OutputItem:
        """Return the open item, or a new one if `part` does not continue it."""
        item = self._item
        if item is None or not item.continues(part):
            self._close(COMPLETED, out)
            names = self._namespaces.get(part.name) if isinstance(part, CallBegin) else None
            item = self._item = new_item(part, self._digits, len(self._done), names)
            for event in item.added():
                self._write(event, out)
        return item

    def _close(self, status: str, out: list[bytes]) -> None:
        item, self._item = self._item, None
        if item is None:
            return
        if self._logprobs and isinstance(item, MessageItem):  # of tokens without text
            self._write(self._with_logprobs(item, item.delta("")), out)
        for event in item.done(status):
            self._write(event, out)
        self._done.append(item.body(status))

    def _take_logprobs(self, choice: Choice) -> None:
        """Take the entries of new tokens, but not of those of the reasoning."""
        if choice.logprobs is None or (found := choice.logprobs.take()) is None:
            return
        self._logprobs += _logprobs(found).content
        # The tokens of the first marker were no reasoning until the last of them came.
        if (hidden := choice.num_reasoning_tokens - self._num_logprobs) > 0:
            hidden = min(hidden, len(self._logprobs))
            self._num_logprobs += hidden
            del self._logprobs[:hidden]

    def _with_logprobs(self, item: OutputItem, event: Event) -> Event:
        if not self._logprobs or not isinstance(item, MessageItem):
            return event
        entries, self._logprobs = self._logprobs, []
        self._num_logprobs += len(entries)
        item.add_logprobs(entries)
        return event | {"logprobs": entries}

    # -- the response -------------------------------------------------------------------------------

    def _final(self) -> dict[str, Any]:
        status = _status(self.answer.choices[0])
        details = {"reason": "max_output_tokens"} if status == INCOMPLETE else None
        return self._response(status, output=self._done, incomplete_details=details, usage=self._usage())

    def _response(self, status: str, **members: Any) -> dict[str, Any]:
        answer = self.answer
        head = {"id": answer.id, "object": "response", "created_at": answer.created, "status": status}
        rest: dict[str, Any] = {"error": None, "incomplete_details": None, "output": [], "usage": None}
        return head | {"model": answer.model} | rest | members | self._repeated

    def _usage(self) -> dict[str, Any]:
        answer = self.answer
        prompt, output = answer.num_tokens()
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": answer.num_cached_tokens, "cache_write_tokens": 0},
            "output_tokens": output,
            "output_tokens_details": {"reasoning_tokens": answer.num_reasoning_tokens},
            "total_tokens": prompt + output,
        }

    def _write(self, event: Event, out: list[bytes]) -> None:
        out.append(_encode(event, self.next_number()))


def _joined(parts: list[Part]) -> list[Part]:
    """Return the parts with adjacent ones of one kind joined."""
    found: list[Part] = []
    for block in blocks(parts):
        if isinstance(block, Call):
            found += [CallBegin(block.index, block.id, block.name), CallArguments(block.index, block.arguments)]
        else:
            found.append(block)
    return found


def _status(choice: Choice) -> str:
    return INCOMPLETE if choice.finish is Finish.LENGTH else COMPLETED


def _encode(event: Event, number: int) -> bytes:
    data = msgspec.json.encode(event | {"sequence_number": number})
    return b"event: %b\ndata: %b\n\n" % (event["type"].encode(), data)
