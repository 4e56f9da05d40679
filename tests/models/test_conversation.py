"""Conversations in the form that a chat template takes, and with an open end."""

import pytest

from daemon.models.chat_template import ChatTemplate
from daemon.models.conversation import render_any, render_open
from daemon.models.template_sandbox import ChatError
from daemon.models.tracked_text import TrackedText, origin, track
from tests.models.templates import BOTH, CHATML, INST, PARTS, REASONING, ROLE_TOKENS

NO_SYSTEM = """\
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
    {{- '<' + m.role + '>' + m.content | trim + '</>' }}
{%- endfor %}
{%- if add_generation_prompt %}<model>{% endif %}"""

FIRST_SYSTEM = """\
{%- for m in messages %}
    {%- if m.role == 'system' and not loop.first %}{{ raise_exception('system must be first') }}{% endif %}
    {{- '<' + m.role + '>' + m.content + '</>' }}
{%- endfor %}
{%- if add_generation_prompt %}<model>{% endif %}"""


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def renderer(path, source, prompt=True):
    (path / "chat_template.jinja").write_text(source)
    (path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    template = ChatTemplate(path)
    return lambda messages: template.render([template.forms.adapt(m) for m in messages], prompt)


@pytest.mark.parametrize(
    ("source", "messages", "expected"),
    [
        (CHATML, [user("a"), user("b")], "<|im_start|>user\na<|im_end|>\n<|im_start|>user\nb<|im_end|>\n"),
        (INST, [user("a"), user("b"), assistant("c"), assistant("d"), user("e")], "[INST] a\n\nb [/INST] c\n\nd "),
        (INST, [system("s"), user("a"), user("b")], "[INST] <<SYS>>\ns\n<</SYS>>\n\na\n\nb [/INST]"),
        (NO_SYSTEM, [system("s"), user("a")], "<user>s\n\na</><model>"),
        (NO_SYSTEM, [system(""), user("a")], "<user>a</><model>"),
        (NO_SYSTEM, [system("s"), user("a"), assistant("b"), system("t"), user("c")],
         "<user>s\n\na</><assistant>b</><user>t\n\nc</><model>"),
        (FIRST_SYSTEM, [system("s"), user("a"), assistant("b"), user("c"), system("t")],
         "<system>s</><user>a</><assistant>b</><user>c\n\nt</><model>"),
        (NO_SYSTEM, [user("a"), assistant("b"), assistant("")], "<user>a</><assistant>b</><model>"),
    ],
)  # fmt: skip
def test_the_nearest_form_that_the_template_takes(tmp_path, source, messages, expected):
    assert expected in render_any(renderer(tmp_path, source), messages)


def test_the_error_is_that_of_the_messages_as_they_are(tmp_path):
    with pytest.raises(ChatError, match="alternate"):
        render_any(renderer(tmp_path, INST), [assistant("a"), user("b"), user("c")])
    calls = [user("a"), assistant("x") | {"tool_calls": [{}]}, assistant("y")]
    with pytest.raises(ChatError, match="alternate"):
        render_any(renderer(tmp_path, INST), calls)


def test_parts_stay_parts_when_messages_become_one(tmp_path):
    source = PARTS.replace("{%- for m in messages %}", "{%- if messages | length > 1 %}{{ raise_exception('one') }}"
                           "{% endif %}{%- for m in messages %}", 1)  # fmt: skip
    messages = [user([{"type": "text", "text": "a"}]), user("b")]
    assert render_any(renderer(tmp_path, source), messages).startswith("<|im_start|>user\nab<|im_end|>")


@pytest.mark.parametrize("source", [CHATML, INST, REASONING, ROLE_TOKENS, PARTS, BOTH], ids=range(6))
@pytest.mark.parametrize("end", ["The answer is", "a", "", "two\nlines", "user"])
def test_an_open_end_is_the_prompt_up_to_the_text(tmp_path, source, end):
    render = renderer(tmp_path, source, prompt=False)
    whole = render([user("user"), assistant(end + "!")])
    assert render_open(render, [user("user"), assistant(end)]) == whole[: whole.rindex("!")]


def test_an_open_end_keeps_white_space_unless_the_template_trims(tmp_path):
    assert render_open(renderer(tmp_path, BOTH, False), [user("x"), assistant("It is ")]).endswith("\nIt is ")
    assert render_open(renderer(tmp_path, CHATML, False), [user("x"), assistant("It is ")]).endswith("\nIt is")


def test_an_open_end_needs_the_text_of_the_message(tmp_path):
    with pytest.raises(ChatError, match="cannot be continued"):
        render_open(renderer(tmp_path, "{{ messages[0].content }}", False), [user("x"), assistant("y")])


def test_the_origin_of_the_text_stays(tmp_path):
    messages = [{**user(TrackedText("a")), "role": "user"}, user(TrackedText("b"))]
    text = render_any(renderer(tmp_path, INST), messages)
    assert [c for c, o in zip(text, origin(text), strict=True) if o] == ["a", "b"]
    text = render_open(renderer(tmp_path, CHATML, False), [user("x"), {"role": "assistant", "content": track("hi")}])
    assert text.endswith("hi") and origin(text)[-3:] == b"\0\1\1"
