"""The grammar that a request asks for, from whichever of its fields. Pure: nothing is compiled here."""

from __future__ import annotations

from typing import NamedTuple

import msgspec
from msgspec import Raw

from daemon.api.errors import bad_request
from daemon.api.grammar.forms import ResponseFormat, StructuredOutputs
from daemon.api.schemas import SamplingRequest
from daemon.api.unsupported import refuse_unsupported
from daemon.models.grammar.source import GrammarKind, GrammarSource

_ANY_OBJECT = '{"type":"object"}'
_CONTRADICTING = ("ignore_eos", "min_tokens", "allowed_token_ids", "bad_words")
_TYPES = ("text", "json_object", "json_schema")


class RequestedGrammar(NamedTuple):
    """A grammar, and the field of the request that it comes from."""

    source: GrammarSource
    param: str


def requested_grammar(request: SamplingRequest) -> RequestedGrammar | None:
    """Return the grammar of a request; None if it asks for none.

    Raises ApiError (400) for a field that has no grammar in it, for two that have, and for a field that contradicts a
    grammar.
    """
    found = [grammar for grammar in _candidates(request) if grammar is not None]
    if not found:
        return None
    if len(found) > 1:
        names = " and ".join(f"`{grammar.param}`" for grammar in found[:2])
        raise bad_request(f"{names} both constrain the output. Send only one of them.", found[1].param)
    check_combination(request, found[0].param)
    return found[0]


def check_combination(request: SamplingRequest, param: str) -> None:
    """Raise ApiError (400) for a field that cannot be combined with the grammar from `param`."""
    for name in (name for name in _CONTRADICTING if getattr(request, name)):
        message = f"`{name}` cannot be combined with `{param}`: the form alone decides where the output ends."
        if name in ("allowed_token_ids", "bad_words"):
            message = f"`{name}` cannot be combined with `{param}`: it could forbid the only token of the form."
        raise bad_request(message, name, "unsupported_parameter")


def forget_forms(request: SamplingRequest) -> None:
    """Free the memory of the fields that constrain the output: their grammar is known."""
    request.response_format = request.structured_outputs = None
    request.guided_json = request.json_schema = Raw()
    request.guided_regex = request.guided_grammar = request.guided_choice = None
    request.regex = request.ebnf = request.grammar = None


def _candidates(request: SamplingRequest) -> list[RequestedGrammar | None]:
    whitespace = request.guided_whitespace_pattern or ""
    json_object = _ANY_OBJECT if request.guided_json_object else ""
    return [
        _of_response_format(request.response_format),
        *_of_structured_outputs(request.structured_outputs),
        _schema(request.guided_json, "guided_json", whitespace=whitespace),
        _of_text(GrammarKind.JSON_SCHEMA, json_object, "guided_json_object"),
        _of_text(GrammarKind.REGEX, request.guided_regex, "guided_regex"),
        _of_choices(request.guided_choice, "guided_choice"),
        _of_text(GrammarKind.GRAMMAR, request.guided_grammar, "guided_grammar"),
        _of_text(GrammarKind.REGEX, request.regex, "regex"),
        _of_text(GrammarKind.GRAMMAR, request.ebnf, "ebnf"),
        _of_text(GrammarKind.GRAMMAR, request.grammar, "grammar"),
        _schema(request.json_schema, "json_schema"),
    ]


def _of_response_format(form: ResponseFormat | None) -> RequestedGrammar | None:
    """Return the grammar of a `response_format`. A schema that is not strict may have keywords without effect."""
    param = "response_format"
    if form is None or form.type == "text":
        return None
    if form.type not in _TYPES:
        message = f"`response_format.type` must be one of {', '.join(_TYPES)}."
        raise bad_request(message, param, "unsupported_parameter")
    if form.type == "json_schema":
        wrapped = form.json_schema
        found = _schema(wrapped.schema if wrapped else form.schema, param, lenient=not (wrapped and wrapped.strict))
        if found is None:
            raise bad_request("`response_format.json_schema.schema` is required.", param)
        return found
    return _schema(form.schema, param, lenient=True) or _of_text(GrammarKind.JSON_SCHEMA, _ANY_OBJECT, param)


def _of_structured_outputs(form: StructuredOutputs | None) -> list[RequestedGrammar | None]:
    if form is None:
        return []
    param = "structured_outputs"
    refuse_unsupported(form, f"{param}.")
    compact, closed = bool(form.disable_any_whitespace), bool(form.disable_additional_properties)
    found = [
        _schema(form.json, param, compact=compact, closed=closed, whitespace=form.whitespace_pattern or ""),
        _of_text(GrammarKind.JSON_SCHEMA, _ANY_OBJECT if form.json_object else "", param),
        _of_text(GrammarKind.REGEX, form.regex, param),
        _of_choices(form.choice, param),
        _of_text(GrammarKind.GRAMMAR, form.grammar, param),
    ]
    if sum(grammar is not None for grammar in found) != 1:
        names = "json, json_object, regex, choice or grammar"
        raise bad_request(f"`{param}` must have exactly one of {names}.", param)
    return found


def _schema(
    raw: Raw, param: str, *, lenient: bool = False, compact: bool = False, closed: bool = False, whitespace: str = ""
) -> RequestedGrammar | None:
    """Return the grammar of a JSON schema: an object, or its text as a JSON string. None for null and no value."""
    data = bytes(raw)
    if data in (b"", b"null", b'""'):
        return None
    try:
        text = msgspec.json.decode(data, type=str) if data.startswith(b'"') else data.decode()
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise bad_request(f"`{param}` is not valid JSON in UTF-8.", param) from None
    source = GrammarSource(GrammarKind.JSON_SCHEMA, text, lenient, compact, whitespace, closed)
    return RequestedGrammar(source, param)


def _of_choices(choices: list[str] | None, param: str) -> RequestedGrammar | None:
    return _of_text(GrammarKind.CHOICE, msgspec.json.encode(choices).decode(), param) if choices else None


def _of_text(kind: GrammarKind, text: str | None, param: str) -> RequestedGrammar | None:
    return RequestedGrammar(GrammarSource(kind, text), param) if text else None
