"""Messages reach a chat template in the form that it takes."""

import pytest

from daemon.models.chat_template import ChatTemplate
from tests.models.templates import BOTH, CHATML, PARTS

TEXT = {"role": "user", "content": "Say hi"}
TWO_PARTS = {"role": "user", "content": [{"type": "text", "text": "Say"}, {"type": "text", "text": "hi"}]}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"city": "Paris"}}}


def template_of(path, source):
    (path / "chat_template.jinja").write_text(source)
    return ChatTemplate(path)


def prompt(path, source, *messages):
    template = template_of(path, source)
    return template.render([template.forms.adapt(m) for m in messages], add_generation_prompt=False)


@pytest.mark.parametrize(
    ("source", "message", "expected"),
    [
        (CHATML, TEXT, "Say hi"),
        (CHATML, TWO_PARTS, "Say\nhi"),
        (PARTS, TEXT, "Say hi"),
        (PARTS, TWO_PARTS, "Sayhi"),  # the template joins them
        (BOTH, TEXT, "Say hi"),
        (BOTH, TWO_PARTS, "Sayhi"),
        ("{{ messages }}", TWO_PARTS, "'content': 'Say\\nhi'"),
        ("{{ messages[-1].content | tojson }}", TWO_PARTS, '"Say\\nhi"'),
        ("{{ messages[-1].content[0].text }}", TEXT, "Say hi"),
        ("{% if messages[0].content is not string %}{{ messages[0].content[0]['text'] }}{% endif %}", TEXT, "Say hi"),
    ],
)  # fmt: skip
def test_content_has_the_form_that_the_template_takes(tmp_path, source, message, expected):
    assert expected in prompt(tmp_path, source, message)


def test_each_role_has_its_own_form(tmp_path):
    source = """\
{%- if messages[0].role == 'system' %}<{{ messages[0].content | trim }}>{% set messages = messages[1:] %}{% endif %}
{%- for m in messages %}{% for part in m.content %}{{ part.text }}|{% endfor %}{% endfor %}"""
    system = TWO_PARTS | {"role": "system"}
    assert (
        prompt(tmp_path, source, system, TWO_PARTS, {"role": "assistant", "content": "ok"}) == "<Say\nhi>Say|hi|ok|"
    )


def test_a_role_that_the_template_refuses_has_the_form_of_the_user(tmp_path):
    source = """\
{%- for m in messages %}
    {%- if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{{ m.content }}
{%- endfor %}"""
    forms = template_of(tmp_path, source).forms
    assert forms.adapt(TWO_PARTS | {"role": "tool"})["content"] == "Say\nhi"


def test_empty_content_is_empty_in_each_form(tmp_path):
    for source in (CHATML, PARTS, BOTH):
        assert "None" not in prompt(tmp_path, source, TEXT, {"role": "assistant", "content": None})


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("{{ c.function.arguments | tojson }}", '{"city": "Paris"}'),
        ("{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}", "city=Paris"),
        ("{% set a = c.function.arguments %}{{ a if a is string else a | tojson }}", '{"city": "Paris"}'),
        ("{{ '```json\\n' + c.function.arguments + '```' }}", '```json\n{"city": "Paris"}```'),  # wants text
    ],
)  # fmt: skip
@pytest.mark.parametrize("content", ["{{ m.content }}", "{% for p in m.content %}{{ p.text }}{% endfor %}"])
def test_arguments_have_the_form_that_the_template_takes(tmp_path, arguments, expected, content):
    source = (
        "{% for m in messages %}"
        + content
        + "{% for c in m.tool_calls or [] %}"
        + arguments
        + "{% endfor %}{% endfor %}"
    )
    assistant = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    result = {"role": "tool", "content": "ok", "tool_call_id": "1"}
    assert prompt(tmp_path, source, TEXT, assistant, result) == f"Say hi{expected}ok"


def test_a_template_that_fails_on_everything_takes_text(tmp_path):
    forms = template_of(tmp_path, "{{ raise_exception('never') }}").forms
    assert forms.adapt(TWO_PARTS)["content"] == "Say\nhi"
    assert forms.object_arguments
