"""Random JSON schemas: nesting, enums, numbers with bounds, optional fields, references. Each seed gives its own."""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any]

_WORDS = ("id", "name", "unit", "count", "tags", "kind", "price", "next", "first line", "größe")
_PATTERNS = ("[A-Z]{2}-[0-9]{3}", "(red|green|blue)", "[a-z]{1,8}")
_FORMATS = ("date", "time", "uuid", "ipv4")


def random_schema(seed: int) -> Schema:
    """Return a schema of an object whose answers are finite, and mostly short."""
    rng = random.Random(seed)
    defs = {"leaf": _value(rng, 1, []), "node": {}}
    defs["node"] = {
        "type": "object",
        "properties": {
            "value": {"type": "integer", "minimum": 0, "maximum": 99},
            "next": _nullable({"$ref": "#/$defs/node"}),
        },
        "required": ["value", "next"],
        "additionalProperties": False,
    }
    schema = _object(rng, 3, ["#/$defs/leaf"] + ["#/$defs/node"] * (rng.random() < 0.3))
    return schema | {"$defs": defs}


def _nullable(schema: Schema) -> Schema:
    return {"anyOf": [{"type": "null"}, schema]}


def _object(rng: random.Random, depth: int, refs: list[str]) -> Schema:
    names = rng.sample(_WORDS, rng.randint(1, 4))
    properties = {name: _value(rng, depth - 1, refs) for name in names}
    required = [name for name in names if rng.random() < 0.7]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _value(rng: random.Random, depth: int, refs: list[str]) -> Schema:
    kinds = [_string, _number, _enum, _constant]
    if refs and rng.random() < 0.2:
        return {"$ref": rng.choice(refs)}
    if depth > 0 and rng.random() < 0.5:
        nested = rng.choice(["object", "array", "anyOf", "tuple"])
        if nested == "object":
            return _object(rng, depth, refs)
        if nested == "array":
            few = rng.randint(0, 2)
            return {"type": "array", "items": _value(rng, depth - 1, refs), "minItems": few, "maxItems": few + 2}
        members = [_value(rng, depth - 1, refs) for _ in range(2)]
        if nested == "anyOf":
            return {"anyOf": members}
        return {"type": "array", "prefixItems": members, "items": False, "minItems": 2}
    return rng.choice(kinds)(rng)


def _string(rng: random.Random) -> Schema:
    return rng.choice(
        [
            {"type": "string", "maxLength": rng.randint(1, 20)},
            {"type": "string", "minLength": 2, "maxLength": 6},
            {"type": "string", "pattern": f"^{rng.choice(_PATTERNS)}$"},
            {"type": "string", "format": rng.choice(_FORMATS)},
        ]
    )


def _number(rng: random.Random) -> Schema:
    low = rng.randint(-50, 50)
    return rng.choice(
        [
            {"type": "integer", "minimum": low, "maximum": low + rng.randint(1, 500)},
            {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": low + 10, "multipleOf": 2},
            {"type": "number", "minimum": 0, "maximum": 1},
        ]
    )


def _enum(rng: random.Random) -> Schema:
    return {"enum": rng.sample(["a", "b c", "ä", 1, 2.5, True, None, "x" * 12], rng.randint(1, 4))}


def _constant(rng: random.Random) -> Schema:
    return rng.choice([{"type": "boolean"}, {"type": "null"}, {"const": rng.randint(0, 9)}])
