"""Chat templates are found wherever a model keeps them, in the order of Transformers."""

import json

import pytest

from daemon.models.chat_template import ChatTemplate
from daemon.models.template_files import read_templates, tool_format
from tests.models.tiny_model import make_tiny_llama

PLAIN, TOOLS, FILE = "plain {{ messages[0].content }}", "tools {{ tools | length }}", "file {{ mood }}"


def write(path, config=None, **files):
    path = make_tiny_llama(path, weights=False)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (path / "tokenizer_config.json").write_text(json.dumps(settings | (config or {})))
    for name, text in files.items():
        file = path / name.replace("__", "/")
        file.parent.mkdir(exist_ok=True)
        file.with_name(f"{file.name}.jinja").write_text(text)
    return path


NAMED = {"chat_template": [{"name": "default", "template": PLAIN}, {"name": "tool_use", "template": TOOLS}]}


@pytest.mark.parametrize(
    ("config", "files", "expected"),
    [
        ({"chat_template": PLAIN}, {}, {"default": PLAIN}),
        (NAMED, {}, {"default": PLAIN, "tool_use": TOOLS}),
        (NAMED, {"chat_template": FILE}, {"default": FILE}),
        (
            {},
            {"chat_template": FILE, "additional_chat_templates__tool_use": TOOLS},
            {"default": FILE, "tool_use": TOOLS},
        ),
        ({}, {}, {}),
    ],
)
@pytest.mark.integration
def test_templates_are_those_of_transformers(tmp_path, config, files, expected):
    from transformers import AutoTokenizer

    path = write(tmp_path / "m", config, **files)
    assert read_templates(path) == expected
    theirs = AutoTokenizer.from_pretrained(path).chat_template
    assert (theirs if isinstance(theirs, dict) else {"default": theirs} if theirs else {}) == expected


def test_a_request_with_tools_gets_the_template_for_tools(tmp_path):
    template = ChatTemplate(write(tmp_path / "m", NAMED))
    messages = [{"role": "user", "content": "hi"}]
    assert template.render(messages) == "plain hi"
    assert template.render(messages, tools=[{}, {}]) == "tools 2"
    assert "mood" in ChatTemplate(write(tmp_path / "n", {}, chat_template=FILE)).variables


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (PLAIN, ""),
        (TOOLS, "other"),
        ("{{ tools }}<tool_call>", "hermes"),
        ("{{ tools }}<tool_call><function=", "qwen3_coder"),
        ("{{ tools }}[TOOL_CALLS]", "mistral"),
        ("{{ tools }}<|python_tag|>", "llama3_json"),
    ],
)
def test_the_format_of_tool_calls(template, expected):
    assert tool_format({"default": template}) == expected
    assert tool_format({"default": PLAIN, "tool_use": template}) == (expected if template != PLAIN else "")
