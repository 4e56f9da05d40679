"""HTTP request bodies: decode them, and explain a wrong value in a plain sentence."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import TypeVar

import msgspec
from aiohttp import web
from msgspec import inspect

from daemon.api.errors import ApiError, bad_request

T = TypeVar("T")

MAX_UNCHECKED = 64 << 10  # bytes of a body whose structure cannot take long to decode
MAX_CONTAINERS = 1 << 16  # lists and objects in a body
MAX_STRINGS = 1 << 18  # with the names of fields
MAX_COMMAS = 1 << 19  # outside of strings: list items and fields
_BACKSLASH = ord("\\")
_MAX_SHOWN = 40  # bytes of a wrong value that its error message repeats

# Error texts of msgspec. Each may end in " - at `$PATH`", with a path such as `.messages[0].role` or `.stop[...]`.
_MISSING = re.compile(r"Object missing required field `(\w+)`")
_WRONG_TYPE = re.compile(r"Expected `([^`]+)`, got `(\w+)`")
_OUT_OF_BOUNDS = re.compile(r"Expected `(\w+)` (?:of length )?[<>]|.*out of range")
_PATH_STEP = re.compile(r"\.(\w+)|\[(?:\d+|\.\.\.)\]")
_TYPE_NAMES = {
    "int": "a whole number",
    "float": "a number",
    "str": "a string",
    "bool": "a boolean",
    "array": "a list",
    "object": "an object",
}
_NUMBERS = (inspect.IntType, inspect.FloatType)
_TYPES: dict[str, tuple[type[inspect.Type], ...]] = {
    "str": (inspect.StrType,),
    "array": (inspect.ListType,),
    "object": (inspect.DictType,),
}


def check_media_type(http: web.Request) -> None:
    """Raise ApiError (415) unless the body is declared as plain JSON."""
    # A web page may send any other type to a local server without a CORS preflight.
    if http.content_type != "application/json":
        raise ApiError(415, "Send the body as JSON, with `Content-Type: application/json`.")
    if http.headers.get("Content-Encoding", "identity") != "identity":
        raise ApiError(415, "A compressed body is not supported.")


def decode_body(body: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """Decode `body`. Raises ApiError (400)."""
    if len(body) > MAX_UNCHECKED:
        check_structure(body)
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as e:
        raise _refusal(str(e), body, decoder.type) from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise bad_request("The body is not valid JSON in UTF-8.") from None
    except RecursionError:
        raise bad_request("The nesting of the body is too deep.") from None


def check_structure(body: bytes) -> None:
    """Raise ApiError (400) if JSON has so many values that decoding them would stop all other requests for long.

    The decoder holds the interpreter's lock until it is done, in any thread. This check does not: it steps from quote
    to quote. Text inside of strings costs nothing, so only the structure is limited, not the size.
    """
    find, count = body.find, body.count
    containers = commas = strings = at = 0
    while True:
        begin = find(b'"', at)
        end = begin if begin >= 0 else len(body)
        if end > at:
            containers += count(b"[", at, end) + count(b"{", at, end)
            commas += count(b",", at, end)
        if containers > MAX_CONTAINERS or strings > MAX_STRINGS or commas > MAX_COMMAS:
            raise bad_request(
                f"The body has too many values: at most {MAX_CONTAINERS} lists and objects, {MAX_STRINGS} strings "
                f"and {MAX_COMMAS} commas between values are allowed. Divide it into several requests."
            )
        if begin < 0:
            return
        at = _end_of_string(body, begin + 1)
        strings += 1


def _end_of_string(body: bytes, at: int) -> int:
    """Return the index behind the closing quote of a string whose first character is at index `at`."""
    while (end := body.find(b'"', at)) >= 0:
        slash = end
        while body[slash - 1] == _BACKSLASH and slash > at:
            slash -= 1
        if (end - slash) % 2 == 0:
            return end + 1
        at = end + 1
    return len(body)


def _refusal(text: str, body: bytes, schema: type) -> ApiError:
    """Turn a text of msgspec, such as "Expected `int` >= 1 - at `$.n`", into an ApiError (400) in plain words.

    `param` is the field of the body, not the path below it; for a missing field it is that field.
    """
    text, _, path = text.partition(" - at `$")
    path = path.removesuffix("`")
    field = m[1] if (m := _PATH_STEP.match(path)) else None
    name = f"`{path[1:]}`" if path else "The body"
    if path.endswith("[...]"):
        name = f"A value of `{path[1:-5]}`"
    if m := _MISSING.match(text):
        where = f" in {name}" if path else ""
        return bad_request(f"`{m[1]}` is required{where}.", m[1])
    value = _shown_value(body, path[1:])
    if m := _WRONG_TYPE.match(text):
        expected = _or([_TYPE_NAMES.get(kind, kind) for kind in m[1].split(" | ")])
        got = value or _TYPE_NAMES.get(m[2], m[2])
        return bad_request(f"{name} must be {expected}, got {got}.", field)
    if m := _OUT_OF_BOUNDS.match(text):
        kinds = _TYPES.get(m[1], _NUMBERS)
        bounds = [_bounds(t) for t in _types_at(schema, path) if isinstance(t, kinds)]
        if bounds and bounds[0]:
            got = f", got {value}" if value else ""
            return bad_request(f"{name} must {bounds[0]}{got}.", field)
    return bad_request(f"{name} is not valid: {text[:1].lower()}{text[1:]}.", field)


def _shown_value(body: bytes, field: str) -> str:
    """Return the JSON text of a field of the body; "" if it is long, nested deeper or cannot be read."""
    try:
        value = bytes(msgspec.json.decode(body, type=dict[str, msgspec.Raw])[field])
        return value.decode() if len(value) <= _MAX_SHOWN else ""
    except (msgspec.MsgspecError, LookupError, ValueError, RecursionError):
        return ""


@cache
def _schema_type(schema: type) -> inspect.Type:
    return inspect.type_info(schema)


def _types_at(schema: type, path: str) -> list[inspect.Type]:
    """Return the types that `schema` allows at `path`, without unions."""
    types = _members([_schema_type(schema)])
    for step in _PATH_STEP.finditer(path):
        inner: list[inspect.Type] = []
        for t in types:
            match t:
                case inspect.StructType():
                    inner += [field.type for field in t.fields if field.encode_name == step[1]]
                case inspect.ListType() if not step[1]:
                    inner.append(t.item_type)
                case inspect.DictType() if not step[1]:
                    inner.append(t.value_type)
        types = _members(inner)
    return types


def _members(types: Iterable[inspect.Type]) -> list[inspect.Type]:
    return [m for t in types for m in (t.types if isinstance(t, inspect.UnionType) else (t,))]


def _bounds(t: inspect.Type) -> str:
    """Say which numbers or lengths a type allows, after "must"; "" if all."""
    match t:
        case inspect.IntType() | inspect.FloatType():
            return _range(t.ge, t.gt, t.le)
        case inspect.StrType():
            return _length(t.min_length, t.max_length, "characters")
        case inspect.ListType():
            return _length(t.min_length, t.max_length, "items")
        case inspect.DictType():
            return _length(t.min_length, t.max_length, "entries")
    return ""


def _range(ge: float | None, gt: float | None, le: float | None) -> str:
    if gt is not None:
        return f"be above {gt}" + ("" if le is None else f" and at most {le}")
    if ge is not None:
        return f"be at least {ge}" if le is None else f"be from {ge} to {le}"
    return "" if le is None else f"be at most {le}"


def _length(low: int | None, high: int | None, unit: str) -> str:
    if high is None:
        return f"have at least {low} {unit}" if low else ""
    return f"have {low} to {high} {unit}" if low else f"have at most {high} {unit}"


def _or(words: list[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
