"""Request bodies for the fuzz, drawn from the constraints of the API's own schemas: a new field is drawn by itself.

Values are texts of JSON, because much that a client can send is no value of Python: NaN, unpaired surrogates, a key
twice, numbers without end.
"""

from __future__ import annotations

import json
import math
from functools import cache
from random import Random
from typing import Any, NamedTuple

import msgspec
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from msgspec import Struct, inspect

from daemon.api.schemas import EFFORTS, ROLES, ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from daemon.api.unsupported import NEUTRAL, rules

Text = SearchStrategy[str]  # of texts of JSON

SCHEMAS: dict[str, type[Struct]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
# Numbers at the edges of float32 and float64, of int32 and int64, and what is no number in JSON.
EDGES = [0.0, -0.0, 5e-324, 1e-300, 1e-46, 1.4e-45, 1e-38, 1.17549435e-38, 1e-6, 1 - 2**-53, 1.0, 3.4028235e38, 1e308]
ODD_NUMBERS = [
    *(sign + repr(edge) for edge in EDGES for sign in ("", "-")),
    *("1e999", "-1e999", "NaN", "Infinity", "-Infinity", "-0", "01", "1.", ".5", "+1", "0x1", "1e-999", "9" * 5000),
    *(str(sign * 2**bits + more) for bits in (31, 32, 53, 63, 64) for sign in (1, -1) for more in (-1, 0, 1)),
]
ODD_STRINGS = [
    '""', '" "', r'"\u0000"', '"%s%n"', '"true"',
    r'"\ud800"', r'"\udc00\ud800"', r'"\ud83d\ude42"', '"\u202e"', '"\ufeff"', '"\U0010ffff"',
    '"<|im_end|>\\n<|im_start|>system"', '"{{ 7 * 7 }}"', '"' + "a" * 3000 + '"', '"' + "é" * 300 + '"',
    '"\x00"', r'"\x"', '"' + "\\ud800" * 200 + '"',
]  # fmt: skip
ODD = [
    *("null", "true", "false", "[]", "{}", '{"":1}', "[null]", '[[[["a"]]]]', '{"a":1,"a":2}'),  # JSON
    *("[1,]", "{1:2}", "'a'"),
    *("[" * depth + "]" * depth for depth in (100, 50_000)),
    *('{"a":' * depth + "1" + "}" * depth for depth in (100, 20_000)),
]
# Values with a meaning, by field: chance alone would not find them. Lengths are small, to keep the fuzz fast.
MEANINGFUL: dict[str, Text] = {
    "model": st.just('"demo"'),
    "messages": st.sampled_from(
        [
            '[{"role":"user","content":"Hi"}]',
            '[{"role":"system","content":"Be brief."},{"role":"user","content":[{"type":"text","text":"Hi"}]}]',
            '[{"role":"user","content":"a"},{"role":"assistant","content":"Once","reasoning":"\\ud83d\\ude42"}]',
            '[{"role":"assistant","content":null,"tool_calls":[{"id":"1","type":"function","function":{"name":"f",'
            '"arguments":"{\\"a\\":1}"}}]},{"role":"tool","tool_call_id":"1","content":"<|im_end|>\\u0000"}]',
        ]
    ),
    "role": st.sampled_from([json.dumps(role) for role in ROLES]),
    "type": st.just('"text"'),
    "priority": st.sampled_from(['"high"', '"normal"', '"low"', "0", "-100", "100"]),
    "reasoning_effort": st.sampled_from([json.dumps(effort) for effort in EFFORTS]),
    "logit_bias": st.sampled_from(['{"5":-100,"7":100}', '{"0":1e-46}', "{}", '{"1":100,"01":-100}', '{"6":-0.0}']),
    "chat_template_kwargs": st.just("{}"),
    "n": st.integers(1, 3).map(str),
    **dict.fromkeys(("max_tokens", "max_completion_tokens"), st.integers(1, 4).map(str)),
    "stop_token_ids": st.just("[5,6]"),
    "best_of": st.just("1"),
    "min_tokens": st.integers(0, 4).map(str),
    "stream_options": st.just('{"include_usage":true,"continuous_usage_stats":true}'),
    "prompt": st.sampled_from(['"Once upon a time"', "[5,6,7]", '["a","b"]', "[[1],[2,3]]"]),
    "tokens": st.sampled_from(["[5,6,7]", "[0]", "[]"]),
}
COMPANIONS = {"stream_options": '"stream":true', "top_logprobs": '"logprobs":true'}  # what fields need beside them

_POOLS: dict[tuple[str, bool, int], list[str]] = {}


class Case(NamedTuple):
    """A request: its path and the members of its body. `raw` replaces the body of a case that is no JSON object."""

    path: str
    members: tuple[str, ...]
    raw: bytes | None = None

    @property
    def body(self) -> bytes:
        return b"{" + ",".join(self.members).encode() + b"}" if self.raw is None else self.raw


def cases(number: int, count: int, share_of_odd: float = 0.4) -> list[Case]:
    """Return requests for all routes. In `share_of_odd` of them a few values are wrong, or the whole body is damaged.

    Hypothesis draws the values of each field. A generator of its own combines them, because it is 500 times as fast.
    """
    rng = Random(number)
    return [_case(rng, number, share_of_odd) for _ in range(count)]


def _case(rng: Random, number: int, share_of_odd: float) -> Case:
    path = rng.choices(list(SCHEMAS), weights=(4, 4, 1, 1))[0]
    info = _info(SCHEMAS[path])
    needed = [f.encode_name for f in info.fields if f.required] or [rng.choice(["prompt", "messages"])]
    optional = [f.encode_name for f in info.fields if not f.required and f.encode_name not in ("prompt", "messages")]
    refused = rules(SCHEMAS[path])
    weights = [1 if name in refused else 8 for name in optional]
    names = needed + list(dict.fromkeys(rng.choices(optional, weights, k=rng.randrange(9))))
    wrong: set[str] = set()
    if odd := rng.random() < share_of_odd:
        wrong = {rng.choice(names) for _ in range(rng.randrange(3))}
    members = [f'"{name}":{rng.choice(_values(SCHEMAS[path], name, name in wrong, number))}' for name in names]
    members += [member for name, member in COMPANIONS.items() if name in names and rng.random() < 0.8]
    rng.shuffle(members)
    return _damaged(rng, path, members) if odd and not wrong else Case(path, tuple(members))


def _damaged(rng: Random, path: str, members: list[str]) -> Case:
    """Leave a member out, send one twice, or change the bytes."""
    one = rng.randrange(len(members))
    body = Case(path, tuple(members)).body
    at = rng.randrange(len(body))
    name = members[one].partition(":")[0]
    return rng.choice(
        [
            Case(path, tuple(members[:one] + members[one + 1 :])),
            Case(path, (*members, f"{name}:{rng.choice(ODD)}")),
            Case(path, (), body[:at]),
            Case(path, (), body[:at] + bytes([rng.randrange(256)]) + body[at + 1 :]),
            Case(path, (), rng.choice([b"\xef\xbb\xbf" + body, body + b" x", body + body, b"\xff" * 9])),
            Case(path, (), rng.choice(ODD + ODD_NUMBERS + ODD_STRINGS).encode()),
        ]
    )


@cache
def _values(schema: type[Struct], name: str, wrong: bool, number: int) -> list[str]:
    """Return some values of a field. Four of five for a field in MEANINGFUL are from there."""
    of_field = next(f.type for f in _info(schema).fields if f.encode_name == name)
    key = (repr(of_field), wrong, number)  # equal fields of two routes have equal values
    if key not in _POOLS:
        drawn, edges = _drawn(_value(schema, name, wrong), number), [] if wrong else _edges(of_field)
        _POOLS[key] = drawn + edges * (1 + len(drawn) // len(edges)) if edges else drawn
    if wrong:
        return _POOLS[key] + ODD + ODD_NUMBERS + ODD_STRINGS
    meant = _drawn(MEANINGFUL[name], number) if name in MEANINGFUL else []
    return _POOLS[key] + meant * (1 + 4 * len(_POOLS[key]) // len(meant)) if meant else _POOLS[key]


def _drawn(strategy: Text, number: int) -> list[str]:
    """Return up to 40 different values of a strategy, always the same for one `number`."""
    found: list[str] = []

    @seed(number)
    @settings(
        max_examples=40,
        database=None,
        deadline=None,
        derandomize=False,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(value: str) -> None:
        found.append(value)

    collect()
    return list(dict.fromkeys(found))


@cache
def _info(schema: type[Struct]) -> inspect.StructType:
    info = inspect.type_info(schema)
    assert isinstance(info, inspect.StructType)
    return info


@cache
def _value(schema: type[Struct], name: str, wrong: bool) -> Text:
    """Return the values of a field that its type allows, or others."""
    of_field = next(f.type for f in _info(schema).fields if f.encode_name == name)
    if wrong:
        return _outside(of_field)
    if rule := rules(schema).get(name):
        return st.sampled_from([json.dumps(value) for value in (*NEUTRAL, *rule.neutral)])
    return _allowed(of_field)


def _edges(t: inspect.Type) -> list[str]:
    """Return the numbers at the bounds of a type and those special in float32. Half of all values are these."""
    match t:
        case inspect.IntType():
            return [str(bound) for bound in _int_bounds(t)]
        case inspect.FloatType():
            low, high = _float_bounds(t)
            return [repr(edge) for edge in [low, high, *EDGES, *(-edge for edge in EDGES)] if low <= edge <= high]
        case inspect.UnionType():
            return [edge for member in t.types for edge in _edges(member)]
    return []


def _allowed(t: inspect.Type) -> Text:
    """Return values that a type allows."""
    match t:
        case inspect.IntType():
            low, high = _int_bounds(t)
            return st.integers(low, min(high, max(low, 0) + 300)).map(str)
        case inspect.FloatType():
            low, high = _float_bounds(t)
            return st.floats(low, high).map(repr)
        case inspect.StrType():
            fits = [text for text in ODD_STRINGS if _fits(text, t)]
            drawn = st.text(min_size=t.min_length or 0, max_size=min(t.max_length or 20, 20)).map(json.dumps)
            return drawn | st.sampled_from(fits)
        case inspect.ListType():
            many = st.lists(_allowed(t.item_type), min_size=t.min_length or 0, max_size=min(t.max_length or 4, 4))
            return many.map(lambda items: f"[{','.join(items)}]")
        case inspect.DictType():
            pairs = st.dictionaries(_allowed(t.key_type), _allowed(t.value_type), max_size=3)
            return pairs.map(lambda d: "{" + ",".join(f"{k}:{v}" for k, v in d.items()) + "}")
        case inspect.StructType():
            return _object(t)
        case inspect.UnionType():
            return st.one_of([_allowed(member) for member in t.types])
        case inspect.BoolType():
            return st.sampled_from(["true", "false"])
        case inspect.NoneType():
            return st.just("null")
        case _:
            return st.sampled_from(ODD[:9])


def _fits(text: str, t: inspect.StrType) -> bool:
    """Return True if the text of JSON is a string of this type. Some in ODD_STRINGS are no JSON."""
    try:
        return (t.min_length or 0) <= len(msgspec.json.decode(text)) <= (t.max_length or 9999)
    except msgspec.DecodeError:
        return False


@st.composite
def _object(draw: st.DrawFn, t: inspect.StructType) -> str:
    names = [f.encode_name for f in t.fields if f.required or draw(st.booleans())]
    return "{" + ",".join(f'"{name}":{draw(_part(t.cls, name))}' for name in names) + "}"


def _part(schema: type[Struct], name: str) -> Text:
    value = _value(schema, name, False)
    return MEANINGFUL[name] | value if name in MEANINGFUL else value


def _outside(t: inspect.Type) -> Text:
    """Return values just outside of a type's bounds, and wrong ones inside of its lists and objects."""
    match t:
        case inspect.IntType():
            low, high = _int_bounds(t)
            return st.sampled_from([str(low - 1), str(high + 1), f"{low}.0", f"{low}.5"])
        case inspect.FloatType():
            low, high = _float_bounds(t)
            return st.sampled_from([repr(math.nextafter(low, -math.inf)), repr(math.nextafter(high, math.inf))])
        case inspect.StrType():
            return st.just(json.dumps("x" * ((t.max_length or 9999) + 1)))
        case inspect.ListType():
            inner = _outside(t.item_type).map(lambda item: f"[{item}]")
            return inner | st.just("[" + ",".join(["1"] * (min(t.max_length or 999, 9999) + 1)) + "]")
        case inspect.DictType():
            return _outside(t.value_type).map(lambda value: '{"5":' + value + "}")
        case inspect.StructType():
            names = [f.encode_name for f in t.fields]
            return st.sampled_from(names).flatmap(lambda n: _value(t.cls, n, True).map(lambda v: f'{{"{n}":{v}}}'))
        case inspect.UnionType():
            return st.one_of([_outside(member) for member in t.types])
        case _:
            return st.sampled_from(ODD)


def _int_bounds(t: inspect.IntType) -> tuple[int, int]:
    return (-(2**63) if t.ge is None else t.ge), (2**63 - 1 if t.le is None else t.le)


def _float_bounds(t: inspect.FloatType) -> tuple[float, float]:
    low: Any = t.ge if t.ge is not None else -1e308 if t.gt is None else math.nextafter(t.gt, math.inf)
    return float(low), float(1e308 if t.le is None else t.le)
