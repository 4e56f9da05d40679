"""The forms of tool calls: what is found, that it does not depend on how the text is cut, and what it costs."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from daemon.api.parse.formats import PARSERS, Parsing, call_ids, detect_reasoning, detect_tool_format, new_parser
from daemon.api.parse.json_scanner import BrokenJson, JsonScanner
from daemon.api.parse.parts import Call, PartParser, Reasoning, Text, blocks

TOOLS = ("get_weather", "f")
FORMATS = list(PARSERS)


def parser(tool_format: str, *, reasoning: str = "", thinking: bool = False, **rest: Any) -> PartParser:
    parsing = Parsing(tool_format, TOOLS, reasoning=reasoning, **rest)
    found = new_parser(parsing, answer="chatcmpl-1", choice=0, thinking=thinking)
    assert found is not None
    return found


def run(parser: PartParser, text: str, cuts: list[int] | None = None) -> list[Any]:
    """Return what the parser finds in a text cut at `cuts`: (name, arguments) of calls, and texts."""
    bounds = [0, *sorted(cuts or []), len(text)]
    parts = [part for begin, end in pairwise(bounds) for part in parser.push(text[begin:end])]
    found = blocks([*parts, *parser.finish()])
    for i, call in enumerate(block for block in found if isinstance(block, Call)):
        assert call.index == i
    return [(b.name, b.arguments) if isinstance(b, Call) else b.text if isinstance(b, Text) else b for b in found]


F = ("f", '{"a": 1}')
W = ("get_weather", '{"city": "Köln", "days": [1, 2.5e3, null]}')
W_JSON = '{"name": "get_weather", "arguments": {"city": "Köln", "days": [1, 2.5e3, null]}}'
F_JSON = '{"name": "f", "arguments": {"a": 1}}'

UNKNOWN = '<tool_call>{"name": "g", "arguments": {}}</tool_call>'
NO_OBJECT = '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'

CASES: list[tuple[str, str, list[Any]]] = [
    ("hermes", f"<tool_call>\n{F_JSON}\n</tool_call>", [F]),
    ("hermes", f"Hm.\n\n<tool_call>{W_JSON}</tool_call>\n<tool_call>\n{F_JSON}\n</tool_call>\n", ["Hm.", W, F]),
    ("hermes", f"<tool_call>{F_JSON}", [F]),
    ("hermes", f"<tool_call>{F_JSON}</tool_call> and so on", [F, "and so on"]),
    ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "f", "id": "x"}</tool_call>', [F]),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>', [("f", "{}")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>', [("f", "{}")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', [F]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "x\ny"}}</tool_call>', [("f", '{"a": "x\\ny"}')]),
    # What is no call stays text.
    ("hermes", " no call \n", [" no call \n"]),
    ("hermes", "a < b <tool", ["a < b <tool"]),
    ("hermes", UNKNOWN, [UNKNOWN]),
    ("hermes", "<tool_call>\nhello</tool_call> x", ["<tool_call>\nhello</tool_call> x"]),
    ("hermes", NO_OBJECT, [NO_OBJECT]),
    ("hermes", '<tool_call>{"name": "f", "name": "f"}', ['<tool_call>{"name": "f", "name": "f"}']),
    ("hermes", '<tool_call>{"name": 7, "arguments": {}}', ['<tool_call>{"name": 7, "arguments": {}}']),
    ("hermes", f"<tool_call>oops <tool_call>{F_JSON}</tool_call>", ["<tool_call>oops", F]),
    ("hermes", '<tool_call>{"name": "f"', ['<tool_call>{"name": "f"']),
    # A call that has begun ends where it breaks.
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 12', [("f", '{"a": 12')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1x}} y', [("f", '{"a": 1x'), "}} y"]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "\\q"}}', [("f", '{"a": "\\'), 'q"}}']),
    ("llama3_json", '{"name": "f", "parameters": {"a": 1}}', [F]),
    ("llama3_json", f'<|python_tag|>{{"name": "f", "parameters": {{"a": 1}}}}; {W_JSON}', [F, W]),
    ("llama3_json", f"\n{F_JSON};<|python_tag|>{W_JSON};", [F, W]),
    ("llama3_json", f"{F_JSON} {W_JSON}\nDone.", [F, W, "Done."]),
    ("llama3_json", '{"type": "function", "name": "f", "parameters": {"a": 1}}', [F]),
    ("llama3_json", '{"answer": {"name": "f"}}', ['{"answer": {"name": "f"}}']),
    ("llama3_json", f"The call is {F_JSON}", [f"The call is {F_JSON}"]),
    ("llama3_json", "<|python_tag|>print(1)", ["<|python_tag|>print(1)"]),
    ("llama3_json", f"{F_JSON}; then", [F, "; then"]),
    ("mistral", f"[TOOL_CALLS] [{F_JSON}, {W_JSON}]", [F, W]),
    ("mistral", f"[TOOL_CALLS][{F_JSON[:-1]}, \"id\": \"123456789\"}}]", [F]),
    ("mistral", '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]f [ARGS] {"a": 2}', [F, ("f", '{"a": 2}')]),
    ("mistral", 'Sure.[TOOL_CALLS]f[CALL_ID]abc[ARGS]{"a": 1} ', ["Sure.", F]),
    ("mistral", '[TOOL_CALLS]f{"a": 1}', [F]),
    ("mistral", '[TOOL_CALLS]g[ARGS]{"a": 1}', ['[TOOL_CALLS]g[ARGS]{"a": 1}']),
    ("mistral", "[TOOL_CALLS]" + "x" * 400, ["[TOOL_CALLS]" + "x" * 400]),
    ("mistral", '[TOOL_CALLS]f[ARGS]{"a": 1', [("f", '{"a": 1')]),
    ("mistral", '[TOOL_CALLS]f[ARGS]{"a"] x', [("f", '{"a"'), "] x"]),
    ("json", F_JSON, [F]),
    ("json", f" [{F_JSON},\n{W_JSON}] ", [F, W]),
    ("json", f"```json\n{F_JSON}\n```", [F]),
    ("json", "```python\nx\n```", ["```python\nx\n```"]),
    ("json", '{"a": 1}', ['{"a": 1}']),
    ("json", "[1, 2]", ["[1, 2]"]),
    ("json", f"Hello {F_JSON}", [f"Hello {F_JSON}"]),
    ("json", f"[{F_JSON}, 5]", [F, "5]"]),
]  # fmt: skip


@pytest.mark.parametrize(("tool_format", "text", "expected"), CASES)
def test_what_is_found(tool_format: str, text: str, expected: list[Any]):
    assert run(parser(tool_format), text) == expected
    assert run(parser(tool_format), text, list(range(1, len(text)))) == expected


PIECES = [
    *("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "```json\n", "```"),
    *("<think>", "</think>", "<", "[", "{", "}", "]", ";", ",", ":", '"', "\\", " ", "\n", "f", "name", "x"),
    *(F_JSON, W_JSON, f"[{F_JSON}, {F_JSON}]", '{"name": "f", "parameters": {', '"a": "b\\u00e9"', "tru", "-1.5e"),
]
texts = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(["", *FORMATS]), st.booleans(), st.booleans(), st.booleans(), texts,
    st.lists(st.integers(0, 400), max_size=10),
)  # fmt: skip
@example(
    "hermes", True, False, True, f"<think>\n hm \n</think>\n\n<tool_call>{F_JSON}</tool_call>", [3, 9, 17, 22, 30]
)
def test_cuts_do_not_matter(
    tool_format: str, reasoning: bool, thinking: bool, parallel: bool, text: str, cuts: list[int]
):
    if not tool_format and not reasoning:
        return
    options = {"reasoning": "think" if reasoning else "", "thinking": reasoning and thinking, "parallel": parallel}
    whole, cut = parser(tool_format, **options), parser(tool_format, **options)
    found = run(whole, text)
    assert run(cut, text, [at for at in cuts if at <= len(text)]) == found
    assert (whole.watching, whole.reasoned) == (cut.watching, cut.reasoned)
    calls = [entry for entry in found if isinstance(entry, tuple)]
    assert all(name in TOOLS for name, _ in calls) and (parallel or len(calls) <= 1)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(FORMATS), texts)
def test_text_without_calls_is_not_lost(tool_format: str, text: str):
    found = run(parser(tool_format), text)
    if not any(isinstance(entry, tuple) for entry in found):
        assert "".join(found) == text


def whole_call(tool_format: str, arguments: str) -> str:
    return {
        "hermes": f'<tool_call>\n{{"name": "f", "arguments": {arguments}}}\n</tool_call>',
        "llama3_json": f'{{"name": "f", "parameters": {arguments}}}',
        "mistral": f"[TOOL_CALLS]f[ARGS]{arguments}",
        "json": f'{{"name": "f", "arguments": {arguments}}}',
    }[tool_format]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(FORMATS), st.dictionaries(st.text(), json_values, max_size=4),
    st.sampled_from([None, 2]), st.booleans(), st.lists(st.integers(0, 300), max_size=6),
)  # fmt: skip
def test_arguments_come_through_as_they_are(
    tool_format: str, value: dict[str, Any], indent: int | None, ascii: bool, cuts: list[int]
):
    arguments = json.dumps(value, indent=indent, ensure_ascii=ascii)
    text = whole_call(tool_format, arguments)
    assert run(parser(tool_format), text, [at for at in cuts if at <= len(text)]) == [("f", arguments)]


def test_arguments_are_told_as_they_arrive():
    found = parser("hermes")
    assert [type(part).__name__ for part in found.push('<tool_call>{"name": "f", "arguments": {"a": "one ')] == [
        "CallBegin", "CallArguments",
    ]  # fmt: skip
    [more] = found.push("two ")
    assert (more.index, more.text) == (0, "two ")


def test_one_call_if_they_may_not_be_parallel():
    text = f"<tool_call>{F_JSON}</tool_call>" * 3
    assert run(parser("hermes", parallel=False), text) == [F]


@pytest.mark.parametrize("tool_format", FORMATS)
@pytest.mark.parametrize(
    "unit",
    [
        "<",
        "<tool_",
        "[TOOL_CALLS]",
        "{",
        "[",
        '"',
        " ",
        "\n",
        '{"name":',
        f"<tool_call>{F_JSON}",
        "\\",
        "1",
        "x",
        ";",
        "`",
    ],
)
@pytest.mark.parametrize(
    "prefix", ["", "<tool_call>", '<tool_call>{"name": "f", "arguments": {"a": "', "[TOOL_CALLS]", "{"]
)
def test_the_work_is_linear(tool_format: str, unit: str, prefix: str):
    """Counts what the parser executes: twice the text may cost at most about twice as much, in whatever state."""

    def work(times: int) -> int:
        found, steps = parser(tool_format, reasoning="think"), 0

        def count(*_: object) -> Any:
            nonlocal steps
            steps += 1
            return count

        sys.settrace(count)
        try:
            for piece in [prefix, *[unit] * times]:
                for char in piece:
                    found.push(char)
            found.finish()
        finally:
            sys.settrace(None)
        return steps

    small, large = work(40), work(80)
    assert large <= 2.2 * small + 200
    held = parser(tool_format, reasoning="think")
    for char in prefix + unit * 40:
        held.push(char)
    assert len(getattr(held, "_held", "")) <= 16


# -- reasoning ------------------------------------------------------------------------------------------

R = Reasoning


@pytest.mark.parametrize(
    ("thinking", "text", "expected"),
    [
        (False, "<think>\nhm, so\n</think>\n\nHello", [R("hm, so"), "Hello"]),
        (False, "\n<think>hm</think>Hello ", [R("hm"), "Hello "]),
        (True, "\nhm\n</think>\nHello", [R("hm"), "Hello"]),
        (True, "<think>hm</think>Hello", [R("hm"), "Hello"]),
        (False, "Hello <think>x</think>", ["Hello <think>x</think>"]),
        (False, "<thin", ["<thin"]),
        (False, "  ", ["  "]),
        (False, "<think>never ends </thi", [R("never ends </thi")]),
        (True, "</think>\n\nHello", ["Hello"]),
        (False, "<think>\n\n</think>\n\nHello", ["Hello"]),
        (False, "<think>a</think></think> b", [R("a"), "</think> b"]),
        (True, "", []),
    ],
)
def test_reasoning(thinking: bool, text: str, expected: list[Any]):
    for cuts in ([], list(range(1, len(text)))):
        assert run(parser("", reasoning="think", thinking=thinking), text, cuts) == expected


def test_reasoning_can_be_left_out():
    assert run(parser("", reasoning="think", show_reasoning=False), "<think>hm</think>Hello") == ["Hello"]


def test_calls_after_reasoning():
    text = f"<think>I call.</think>\n\n<tool_call>{F_JSON}</tool_call>"
    assert run(parser("hermes", reasoning="think"), text) == [R("I call."), F]


# -- JSON -----------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(json_values, st.sampled_from([None, 1]), st.text('{}[]":,\\truefalsn0-.eE +u', max_size=3), st.integers(0, 60))
def test_the_scanner_agrees_with_pythons_json(value: Any, indent: int | None, noise: str, at: int):
    text = json.dumps(value, indent=indent)
    text = text[:at] + noise + text[at:]
    scanner, out = JsonScanner(), []
    try:
        end = scanner.feed(text + " ", 0, out)
        valid = scanner.done and not text[end:].strip()
    except BrokenJson:
        valid = False
    try:
        json.loads(text, parse_constant=lambda _: 1 / 0)
        expected = True
    except (ValueError, ZeroDivisionError):
        expected = False
    assert valid == expected
    if valid:
        assert "".join(out).strip() == text[:end].strip()


def test_deep_json_is_broken_and_not_an_error():
    assert run(parser("json"), '{"name": "f", "arguments": ' + "[" * 100_000) != []
    with pytest.raises(BrokenJson):
        JsonScanner().feed("[" * 1000, 0, [])


# -- which form -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "tool_format", "reasoning"),
    [
        ("{{ '<tool_call>' }}...<think>", "hermes", "think"),
        ("<tool_call>\n<function=example>", "", ""),
        ("[TOOL_CALLS]", "mistral", ""),
        ("<|python_tag|>", "llama3_json", ""),
        ("{%- if tools %}{{ tools | tojson }}", "json", ""),
        ("<|channel|>commentary", "", ""),
        ("<|python_start|>", "", ""),
        ("", "json", ""),
    ],
)
def test_the_template_tells_the_form(template: str, tool_format: str, reasoning: str):
    assert detect_tool_format(template) == tool_format
    assert detect_reasoning(template) == reasoning


def test_ids_of_calls_are_a_function_of_answer_choice_and_index():
    ids = [call_ids("hermes", answer, choice)(index) for answer in "ab" for choice in (0, 1) for index in (0, 1)]
    assert len(set(ids)) == 8 and ids[0] == call_ids("hermes", "a", 0)(0)
    assert all(id.startswith("call_") and len(id) == 29 for id in ids)
    mistral = call_ids("mistral", "a", 0)(0)
    assert len(mistral) == 9 and mistral.isalnum() and mistral.isascii()
