"""Chat templates: equal to Transformers, sandboxed, with clear errors."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.models import chat_template
from daemon.models.chat_template import ChatError, ChatTemplate
from daemon.models.model_config import ModelError
from tests.models.tiny_model import CHAT_TEMPLATE, demo_model_dir, make_tiny_llama

TOOLS = """\
{%- set ns = namespace(system='none') %}
{% for m in messages %}
    {%- if m.role == 'system' %}
        {%- set ns.system = m['content'] | trim %}
        {%- continue %}
    {% endif %}
    {% if loop.last and m.role == 'stop' %}{% break %}{% endif %}
    {{- bos_token if loop.first }}[{{ m.role }}] {% generation %}{{ m.content }}{% endgeneration %}{{ eos_token }}
{% endfor %}
{% if tools is not none %}{{ tools | tojson(indent=2) }}{% endif %}
{% if flavour is defined %}{{ flavour }}{% endif %}
{{ ns.system }} {{ strftime_now('%Y') }} {{ messages[0] | tojson }}
{%- if add_generation_prompt %}>{% endif %}
"""

roles = st.sampled_from(["system", "user", "assistant", "stop"])
message = st.fixed_dictionaries({"role": roles, "content": st.text(max_size=20)})


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(make_tiny_llama(tmp_path_factory.mktemp("m"), weights=False))


def with_template(path, source, **config):
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    if source is not None:
        (path / "chat_template.jinja").write_text(source)
    return ChatTemplate(path)


@pytest.mark.parametrize("source", [CHAT_TEMPLATE, TOOLS])
def test_rendering_equals_transformers(tmp_path, reference, source):
    ours = with_template(tmp_path, source, bos_token={"content": "<|endoftext|>"}, eos_token="<|im_end|>")
    variables = {"tools": [{"name": "é<b>", "parameters": {}}], "flavour": "x"}

    @settings(max_examples=60, deadline=None)
    @given(st.lists(message, min_size=1, max_size=4), st.booleans(), st.booleans())
    def check(messages, prompt, more):
        extra = variables if more else {}
        expected = reference.apply_chat_template(
            messages, chat_template=source, tokenize=False, add_generation_prompt=prompt, **extra
        )
        assert ours.render(messages, prompt, **extra) == expected

    check()


def test_rendering_the_demo_model_equals_transformers():
    from transformers import AutoTokenizer

    path = demo_model_dir()
    messages = [{"role": "user", "content": "Hi <|im_end|> é\n"}, {"role": "assistant", "content": ""}]
    expected = AutoTokenizer.from_pretrained(path).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert ChatTemplate(path).render(messages) == expected
    assert "You are a helpful AI assistant" in expected


def test_precedence_of_template_sources(tmp_path):
    assert with_template(tmp_path, None, chat_template="one").render([]) == "one"
    both = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "two"}]
    assert with_template(tmp_path, None, chat_template=both).render([]) == "two"
    assert with_template(tmp_path, "three", chat_template="one").render([]) == "three"


def test_without_a_template_chat_is_refused(tmp_path):
    template = ChatTemplate(tmp_path)
    assert not template.available
    with pytest.raises(ChatError, match="no chat template"):
        template.render([{"role": "user", "content": "x"}])


def test_a_template_that_does_not_compile_is_a_model_error(tmp_path):
    with pytest.raises(ModelError, match="line 2"):
        with_template(tmp_path, "\n{% for %}")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].nothing.more }}", "no attribute|undefined"),
        ("{{ messages[0].content + 1 }}", "does not expect their form"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{% for i in range(10**9) %}{% endfor %}", "loops"),
        ("{% for i in range(1000) %}{% for j in range(1000) %}{% endfor %}{% endfor %}", "loops"),
        ("{{ 'a' * 10**9 }}", "too large"),
        ("{{ [1] * 1000000 }}", "too large"),
        ("{{ ('a' * 50000) * 50000 }}", "too large"),
        ("{{ 10 ** 10 ** 9 }}", "too large"),
        ("{{ 10 ** 60 ** 60 }}", "too large"),
        ("{{ lipsum(1000000) }}", "undefined"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "nested too deeply"),
        ("{% include '/etc/passwd' %}", "does not expect their form|loader"),
    ],
)
def test_a_template_can_only_compute_text(tmp_path, source, reason):
    with pytest.raises(ChatError, match=reason):
        with_template(tmp_path, source).render([{"role": "user", "content": "x"}])


def test_small_products_are_allowed(tmp_path):
    template = with_template(tmp_path, "{{ '-' * 5 }}{{ 2 ** 10 }}{{ 1000000 * 1000000 }}{{ 1.5 * 2 }}")
    assert template.render([]) == "-----102410000000000003.0"


def test_the_output_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(chat_template, "MAX_OUTPUT", 10_000)
    template = with_template(tmp_path, "{% for i in range(1000) %}0123456789{% endfor %}!")
    with pytest.raises(ChatError, match="more text"):
        template.render([])


def test_special_tokens_of_the_older_file_are_known(tmp_path):
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<s>"}}))
    assert with_template(tmp_path, "{{ bos_token + 'x' }}{{ eos_token }}", eos_token="</s>").render([]) == "<s>x</s>"


def test_variables_cannot_replace_the_built_in_ones(tmp_path):
    source = "{{ messages[0].content }}{{ bos_token }}{{ range(2) | list }}"
    template = with_template(tmp_path, source, bos_token="<s>")
    rendered = template.render([{"content": "m"}], bos_token="x", range="y")
    assert rendered == "m<s>[0, 1]"
    assert template.render([{"content": "m"}]) == rendered  # each rendering has its own limit of `range`
