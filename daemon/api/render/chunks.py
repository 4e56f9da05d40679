"""What chat and text completions have in common: an answer is written as chunks of its choices."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from daemon.api.parse.parts import Part, Text
from daemon.api.render import chunk_writer
from daemon.api.render.answer import Answer
from daemon.api.render.chunk_writer import ChunkWriter
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
        """Forget the logprobs that are written. No other event depends on earlier ones."""
        choice = self.answer.choices[index]
        if choice.logprobs is not None:
            choice.logprobs.take()

    def write_begin(self, index: int, out: list[bytes]) -> None:
        writer, usage = self._writers[index], self._usage()
        if self.chat:
            out.append(writer.role(usage))
        if echo := self.answer.echo(index):
            out.append(writer.text(echo, None, usage))

    def write_parts(self, index: int, parts: list[Part], out: list[bytes]) -> None:
        choice, writer = self.answer.choices[index], self._writers[index]
        logprobs = choice.logprobs.take() if choice.logprobs else None
        usage = self._usage()
        for part in parts:
            if isinstance(part, Text):  # the hot path
                out.append(writer.text(part.text, logprobs, usage))
            else:
                out.append(writer.part(part, logprobs, usage))
            logprobs = None
        if logprobs:
            out.append(writer.text("", logprobs, usage))
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
        return head | {"choices": choices, "usage": answer.usage()}

    def _choice(self, index: int, parts: list[Part]) -> dict[str, Any]:
        logprobs = self.answer.choices[index].logprobs
        rest = {"logprobs": logprobs.take() if logprobs else None, "finish_reason": self.answer.reason(index)}
        return {"index": index} | self.content(self.answer.echo(index), parts) | rest

    @abstractmethod
    def content(self, echo: str, parts: list[Part]) -> dict[str, Any]:
        """Return the members of a choice that hold its parts; `echo` comes before its text."""

    def _usage(self) -> dict[str, Any] | None:
        return self.answer.usage() if self._continuous else None
