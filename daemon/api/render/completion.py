"""Renders an answer as OpenAI's text completion: all of its parts are text."""

from __future__ import annotations

from typing import Any

from daemon.api.parse.parts import Part, Text
from daemon.api.render.chunks import ChunkRenderer


class CompletionRenderer(ChunkRenderer):
    chat = False

    def content(self, echo: str, parts: list[Part]) -> dict[str, Any]:
        return {"text": echo + "".join(part.text for part in parts if isinstance(part, Text))}
