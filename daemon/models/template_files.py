"""Where a model directory keeps its chat templates, and which format of tool calls a template asks for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from daemon.models.files import ModelError, read_json

DEFAULT, TOOL_USE = "default", "tool_use"
_FILE, _DIRECTORY = "chat_template.jinja", "additional_chat_templates"

# What a template writes around the calls of a model, the most special first. The names are those that vLLM uses.
_TOOL_FORMATS = (
    ("deepseek", "tool▁calls▁begin"),
    ("mistral", "[TOOL_CALLS]"),
    ("kimi", "<|tool_calls_section_begin|>"),
    ("harmony", "<|channel|>"),
    ("glm", "<arg_key>"),
    ("qwen3_coder", "<function="),
    ("hermes", "<tool_call>"),
    ("granite", "<|tool_call|>"),
    ("phi4_mini", "<|tool|>"),
    ("llama3_json", "<|python_tag|>"),
    ("llama3_json", '{"name": function name, "parameters":'),
    ("pythonic", "[func_name1("),
)


def read_templates(path: Path) -> dict[str, str]:
    """Return the chat templates by name; the usual one is DEFAULT. Raises ModelError for a file that is no text.

    The order is that of Transformers: chat_template.jinja and additional_chat_templates/NAME.jinja replace what
    tokenizer_config.json has. chat_template.json, of older models with images, comes last.
    """
    found = {} if (text := _read(path / _FILE)) is None else {DEFAULT: text}
    for file in sorted((path / _DIRECTORY).glob("*.jinja")):
        found[file.stem] = _read(file) or ""
    for file_name in ("tokenizer_config.json", "chat_template.json"):
        found = found or _of_config(read_json(path / file_name) or {})
    return found


def tool_format(templates: Mapping[str, str]) -> str:
    """Return the name of the format of tool calls: "" if no template takes tools, "other" if it is not known."""
    source = templates.get(TOOL_USE) or templates.get(DEFAULT, "")
    if "tools" not in source:
        return ""
    return next((name for name, mark in _TOOL_FORMATS if mark in source), "other")


def _of_config(config: Mapping[str, Any]) -> dict[str, str]:
    value = config.get("chat_template")
    if isinstance(value, str):
        return {DEFAULT: value}
    named = value if isinstance(value, list) else []
    entries = {t.get("name"): t.get("template") for t in named if isinstance(t, dict)}
    return {n: t for n, t in entries.items() if isinstance(n, str) and isinstance(t, str)}


def _read(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        raise ModelError(f"cannot read {file}: it is not UTF-8 text") from None
    except OSError as e:
        raise ModelError(f"cannot read {file}: {e.strerror or e}") from None
