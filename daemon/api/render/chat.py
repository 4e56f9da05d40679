"""Renders an answer as OpenAI's chat completion."""

from __future__ import annotations

from typing import Any

from daemon.api.parse.parts import Call, Part, Reasoning, Text, blocks
from daemon.api.render.chunks import ChunkRenderer


class ChatRenderer(ChunkRenderer):
    chat = True

    def content(self, echo: str, parts: list[Part]) -> dict[str, Any]:
        found = blocks(parts)
        text = echo + "".join(block.text for block in found if isinstance(block, Text))
        reasoning = "".join(block.text for block in found if isinstance(block, Reasoning))
        calls = [_tool_call(block) for block in found if isinstance(block, Call)]
        message: dict[str, Any] = {
            "role": "assistant",
            "content": text if text or not calls else None,
            "refusal": None,
        }
        if reasoning:
            message |= {"reasoning_content": reasoning, "reasoning": reasoning}
        if calls:
            message["tool_calls"] = calls
        return {"message": message}


def _tool_call(call: Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
