"""The parser of an answer: which form its tool calls have, and whether it may reason. Pure.

Both follow from the chat template of the model, in which the markers stand that the model was trained on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence

import msgspec

from daemon.api.parse import reasoning
from daemon.api.parse.call_parsers import CallParser, HermesParser, JsonParser, LlamaParser, MistralParser
from daemon.api.parse.parts import PartParser
from daemon.api.parse.reasoning import ThinkParser

HERMES, LLAMA, MISTRAL, JSON = "hermes", "llama3_json", "mistral", "json"
THINK = "think"
AUTO, NONE = "auto", "none"  # values of the options

PARSERS: dict[str, type[CallParser]] = {
    HERMES: HermesParser,
    LLAMA: LlamaParser,
    MISTRAL: MistralParser,
    JSON: JsonParser,
}
_OTHER_FORMS = (
    *("<\uff5ctool\u2581calls\u2581begin\uff5c>", "<|tool_calls_section_begin|>"),  # DeepSeek, Kimi
    *("<|channel|>", "<|tool_call|>", "<tool_calls>", "<|tool_call_start|>"),  # gpt-oss, Granite, Jamba, LFM
    *("<|python_start|>", "<|START_ACTION|>", "<|action_start|>", "<function_calls>"),  # Llama 4, Command, InternLM
)
_BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def write_calls(tool_format: str, calls: Sequence[tuple[str, str]]) -> str:
    """Return the text that a model writes to make these calls, each a name and the JSON text of its arguments."""
    key = "parameters" if tool_format == LLAMA else "arguments"
    objects = [f'{{"name": {json.dumps(name)}, "{key}": {arguments}}}' for name, arguments in calls]
    match tool_format:
        case "hermes":
            return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in objects)
        case "llama3_json":
            return "; ".join(
                f'{{"name": {json.dumps(name)}, "parameters": {arguments}}}' for name, arguments in calls
            )
        case "mistral":
            return f"[TOOL_CALLS][{', '.join(objects)}]"
    return objects[0] if len(objects) == 1 else f"[{', '.join(objects)}]"


class Parsing(msgspec.Struct, array_like=True, frozen=True):
    """What the parser of each choice must know to find its parts."""

    tool_format: str = ""  # of PARSERS; "": no calls
    tools: tuple[str, ...] = ()  # names that a call may have
    parallel: bool = True  # more than one call
    forced: bool = False  # the request names the tool to call
    reasoning: str = ""  # THINK, or "": none
    show_reasoning: bool = True  # otherwise it is left out of the answer


def detect_tool_format(template: str) -> str:
    """Return the form of the calls of a model with this chat template; "" if it has one that is not known here."""
    if "[TOOL_CALLS]" in template:
        return MISTRAL
    if "<tool_call>" in template:
        return "" if "<function=" in template or "<arg_key>" in template else HERMES  # Qwen3-Coder, GLM: XML
    if "<|python_tag|>" in template or '"parameters": dictionary' in template:
        return LLAMA
    return "" if any(marker in template for marker in _OTHER_FORMS) else JSON


def detect_reasoning(template: str) -> str:
    return THINK if reasoning.END in template or reasoning.BEGIN in template else ""


def shown_texts(parsing: Parsing | None) -> frozenset[str]:
    """Return the markers that a parser must see, even if their tokens are special and otherwise have no text."""
    if parsing is None:
        return frozenset()
    calls = PARSERS[parsing.tool_format].markers if parsing.tool_format else ()
    return frozenset((*calls, *((reasoning.BEGIN, reasoning.END) if parsing.reasoning else ())))


def call_ids(tool_format: str, answer: str, choice: int) -> Callable[[int], str]:
    """Return the ids of the calls of one choice, by index. They are hashes, so that a successor finds them too."""

    def call_id(index: int) -> str:
        digest = hashlib.blake2b(f"{answer}/{choice}/{index}".encode(), digest_size=12).digest()
        if tool_format == MISTRAL:  # its templates take only ids of nine letters and digits
            number = int.from_bytes(digest, "big")
            return "".join(_BASE62[number // 62**i % 62] for i in range(9))
        return f"call_{digest.hex()}"

    return call_id


def new_parser(parsing: Parsing | None, *, answer: str, choice: int, thinking: bool) -> PartParser | None:
    """Return the parser of a choice; None if all of its text is plain. `thinking`: its prompt has begun reasoning."""
    if parsing is None:
        return None
    calls: CallParser | None = None
    if parsing.tool_format:
        ids = call_ids(parsing.tool_format, answer, choice)
        calls = PARSERS[parsing.tool_format](frozenset(parsing.tools), ids, parallel=parsing.parallel)
    if parsing.reasoning:
        return ThinkParser(thinking=thinking, show=parsing.show_reasoning, rest=calls)
    return calls
