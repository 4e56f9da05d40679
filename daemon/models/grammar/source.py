"""What a client asks an answer to match, and the same in the form that llguidance compiles.

An answer is `reasoning`, if the model may reason, and then either tool calls or the form that is asked for.
"""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Any

import msgspec

from daemon.models.grammar.errors import GrammarError

# Between the parts of a JSON text: what pretty printers write. A model that may write any number of spaces can go on
# with them for ever.
_WHITESPACE = r" {1,2}|\r?\n[ \t]{0,24}"
_OPTIONS = "x-guidance"  # llguidance reads its options from this key of a schema


class GrammarKind(StrEnum):
    """The language that the text of a source is written in."""

    NONE = "none"  # the text is empty
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"  # the whole answer matches it
    CHOICE = "choice"  # a JSON list of strings
    GRAMMAR = "grammar"  # GBNF if it contains `::=`, otherwise llguidance's variant of Lark


class Reasoning(msgspec.Struct, array_like=True, frozen=True):
    """How reasoning begins and ends, each as Lark takes it: ``<[id]>`` or a text. `open`: the prompt has begun it."""

    begin: str
    end: str
    open: bool = False


class GrammarSource(msgspec.Struct, array_like=True, frozen=True):
    """A grammar as a client has sent it. The options are for JSON schemas.

    `lenient`: ignore keywords that cannot be enforced. `compact`: no whitespace between the parts. `whitespace`: the
    regex of it; "": the default. `closed`: objects have only the properties that the schema names. `calls`: rules in
    Lark, of which `calls` matches tool calls; the answer may consist of these instead. `reasoning`: may come before.
    """

    kind: GrammarKind
    text: str = ""
    lenient: bool = False
    compact: bool = False
    whitespace: str = ""
    closed: bool = False
    calls: str = ""
    reasoning: Reasoning | None = None

    @property
    def size(self) -> int:
        """Size of what the client has sent, in bytes."""
        return len(self.text.encode()) + len(self.calls.encode())


def to_llguidance(source: GrammarSource) -> str:
    """Return the grammar as llguidance takes it. Raises GrammarError if the text is not of its kind.

    What the grammar means is checked when it is compiled.
    """
    form = _form(source)
    if not (source.calls or source.reasoning):
        return form
    rules, named = source.calls, ""
    answers = ["calls"] if source.calls else []
    if form:
        answers.append("@form")
        named = form
    start = " | ".join(answers)
    if source.reasoning is not None:
        start, thoughts = _after_reasoning(start, source.reasoning)
        rules += thoughts
    lark = f"%llguidance {{}}\nstart: {start}\n{rules}"
    grammars = [{"name": "answer", "lark_grammar": lark}, *_named(named)]
    return json.dumps({"grammars": grammars}, ensure_ascii=False)


def _named(form: str) -> list[dict[str, Any]]:
    """Return a form as a grammar that others can refer to as `@form`; none if it is empty."""
    if not form:
        return []
    if form.startswith("{"):
        return [msgspec.json.decode(form)["grammars"][0] | {"name": "form"}]
    return [{"name": "form", "lark_grammar": form}]


def _after_reasoning(answer: str, reasoning: Reasoning) -> tuple[str, str]:
    """Return the first rule and the other rules of an answer with reasoning before it."""
    if reasoning.end.startswith("<["):
        thought = f"thought: /(?s:.*)/ {reasoning.end} /\\s*/"
    else:  # text, which ends at the first marker
        thought = f"thought: until /\\s*/\nuntil[suffix={reasoning.end}]: /(?s:.*)/"
    begun = "thought" if reasoning.open else f"({reasoning.begin} thought)?"
    return f"{begun} ({answer})", f"{thought}\n"


def _form(source: GrammarSource) -> str:
    from llguidance import LLMatcher

    match source.kind:
        case GrammarKind.NONE:
            return ""
        case GrammarKind.JSON_SCHEMA:
            return _with_schema(source)
        case GrammarKind.REGEX:
            return LLMatcher.grammar_from_regex(source.text)
        case GrammarKind.CHOICE:
            return _one_of(source.text)
        case GrammarKind.GRAMMAR:
            return _lark(source.text)


def _with_schema(source: GrammarSource) -> str:
    try:
        schema = msgspec.json.decode(source.text)
    except (msgspec.DecodeError, RecursionError) as e:
        raise GrammarError(f"the schema is not JSON: {e}") from None
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise GrammarError("a JSON schema is an object")
    if source.closed:
        schema = _closed(schema)
    schema |= schema_options(lenient=source.lenient, compact=source.compact, whitespace=source.whitespace)
    return json.dumps({"grammars": [{"json_schema": schema}]}, ensure_ascii=False)


def schema_options(*, lenient: bool, compact: bool = False, whitespace: str = "") -> dict[str, Any]:
    """Return the options of llguidance as an entry of a JSON schema. See `GrammarSource`."""
    options: dict[str, Any] = {"whitespace_flexible": False}
    if not compact:
        options = {"whitespace_pattern": whitespace or _WHITESPACE}
    return {_OPTIONS: options | {"lenient": lenient}}


def _closed(schema: Any) -> Any:
    """Return a schema whose objects have no properties besides those that it names."""
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: value if key in ("const", "enum") else _closed(value) for key, value in schema.items()}
    is_object = "properties" in schema and isinstance(schema["properties"], dict)
    return closed | {"additionalProperties": False} if is_object or schema.get("type") == "object" else closed


def _one_of(text: str) -> str:
    try:
        choices = msgspec.json.decode(text, type=list[str])
    except msgspec.DecodeError:
        raise GrammarError("the choices must be a list of strings") from None
    if not choices or "" in choices:
        raise GrammarError("the choices must be a list of one or more strings, none of them empty")
    return "start: " + " | ".join(map(json.dumps, dict.fromkeys(choices)))


def _lark(text: str) -> str:
    if "::=" not in text:
        return text
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return any_to_lark(text)
    except Exception as e:  # the converter raises errors of several kinds, and a RecursionError
        raise GrammarError(f"the grammar cannot be read as GBNF: {e}") from None
