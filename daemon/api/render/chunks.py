"""What chat and text completions have in common: an answer is written as chunks of its choices."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import msgspec

from daemon.api.parse.parts import Part, Text
from daemon.api.render import chunk_writer
from daemon.api.render.answer import Answer
from daemon.api.render.chunk_writer import ChunkWriter
from daemon.api.render.prompt_details import NO_DETAILS
from daemon.api.render.renderer import Renderer


class ChunkRenderer(Renderer):
    """Writes one event for each part. `chat`: the events are those of a chat."""

    closing = chunk_writer.DONE
    chat: ClassVar[bool]

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer)
        form = answer.form
        self._continuous = form.continuous_usage
        self._include_usage = form.include_usage
        self._identity: dict[str, Any] = {
            "chat": self.chat,
            "id": answer.id,
            "created": answer.created,
            "model": answer.model,
        }
        self._writers = [
            ChunkWriter(**self._identity, index=i, include_usage=form.include_usage)
            for i in range(len(answer.choices))
        ]

    def replay(self, index: int, parts: list[Part]) -> None:
        """Forget the logprobs and ids that are written. No other event depends on earlier ones."""
        choice = self.answer.choices[index]
        choice.take_ids()
        if choice.logprobs is not None:
            choice.logprobs.take()

    def write_begin(self, index: int, out: list[bytes]) -> None:
        choice, writer, usage = self.answer.choices[index], self._writers[index], self._usage()
        first = len(out)
        if self.chat:
            out.append(writer.role(usage))
        echo = self.answer.echo(index)
        logprobs = choice.logprobs.take() if choice.logprobs and self.answer.form.echo_logprobs else None
        ids = choice.prompt.token_ids if choice.prompt else None
        if echo or logprobs or (ids and not self.chat):
            out.append(writer.text(echo, logprobs, usage))
        if ids:
            member = chunk_writer.with_top_member if self.chat else writer.with_member
            out[first] = member(out[first], b"prompt_token_ids", bytes(ids))

    def write_parts(self, index: int, parts: list[Part], out: list[bytes]) -> None:
        choice, writer = self.answer.choices[index], self._writers[index]
        logprobs = choice.logprobs.take() if choice.logprobs else None
        usage, ids, first = self._usage(), choice.take_ids(), len(out)
        for part in parts:
            if isinstance(part, Text):  # the hot path
                out.append(writer.text(part.text, logprobs, usage))
            else:
                out.append(writer.part(part, logprobs, usage))
            logprobs = None
        if logprobs or (ids and len(out) == first):
            out.append(writer.text("", logprobs, usage))
        if ids:
            out[first] = writer.with_member(out[first], b"token_ids", msgspec.json.encode(ids))
        if choice.finish:
            out.append(writer.finish(self.answer.reason(index), usage))

    def write_end(self, out: list[bytes]) -> None:
        if self._include_usage:
            out.append(chunk_writer.usage_chunk(chunk_writer.chunk_head(**self._identity), self.answer.usage()))

    def whole(self, parts: list[list[Part]]) -> dict[str, Any]:
        answer = self.answer
        kind = "chat.completion" if self.chat else "text_completion"
        choices = [self._choice(i, found) for i, found in enumerate(parts)]
        head = {"id": answer.id, "object": kind, "created": answer.created, "model": answer.model}
        body = head | {"choices": choices, "usage": answer.usage()}
        return body | self._prompt_members(0) if self.chat else body

    def _choice(self, index: int, parts: list[Part]) -> dict[str, Any]:
        logprobs = self.answer.choices[index].logprobs
        rest = {"logprobs": logprobs.take() if logprobs else None, "finish_reason": self.answer.reason(index)}
        found = {"index": index} | self.content(self.answer.echo(index), parts) | rest
        if (ids := self.answer.choices[index].take_ids()) is not None:
            found["token_ids"] = ids
        return found if self.chat else found | self._prompt_members(index)

    def _prompt_members(self, index: int) -> dict[str, Any]:
        """Return what the client has asked to get of the prompt of a choice, besides its text."""
        details = self.answer.choices[index].prompt or NO_DETAILS
        members = {"prompt_token_ids": details.token_ids, "prompt_logprobs": details.logprobs}
        return {name: value for name, value in members.items() if value is not None}

    @abstractmethod
    def content(self, echo: str, parts: list[Part]) -> dict[str, Any]:
        """Return the members of a choice that hold its parts; `echo` comes before its text."""

    def _usage(self) -> dict[str, Any] | None:
        return self.answer.usage() if self._continuous else None
