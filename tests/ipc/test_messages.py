"""Every message survives encode and decode; a decoder rejects all other bytes with an error."""

from __future__ import annotations

from contextlib import suppress
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.ipc import messages as m

DECODERS = {name.removeprefix("decode_"): f for name, f in vars(m).items() if name.startswith("decode_")}
PLAIN = {
    int: st.integers(-(2**63), 2**64 - 1),
    float: st.floats(allow_nan=False),
    bool: st.booleans(),
    str: st.text(max_size=9),
    bytes: st.binary(max_size=9),
    NoneType: st.none(),
}
each_wire = pytest.mark.parametrize("wire", DECODERS)


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Return a strategy for a type that messages use."""
    if kind in PLAIN:
        return PLAIN[kind]
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return st.builds(kind, **{name: values_of(field) for name, field in get_type_hints(kind).items()})
    if isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields"):
        return st.builds(kind, **{name: values_of(field) for name, field in get_type_hints(kind).items()})
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return st.one_of(*map(values_of, args))
    if origin is dict:
        return st.dictionaries(values_of(args[0]), values_of(args[1]), max_size=4)
    if origin is list:
        return st.lists(values_of(args[0]), max_size=4)
    assert origin is tuple, kind
    return (
        st.lists(values_of(args[0]), max_size=4).map(tuple)
        if args[1:] == (...,)
        else st.tuples(*map(values_of, args))
    )


def decoded_type(wire: str) -> Any:
    """Return the type that a decoder returns: a message or a union of messages."""
    return DECODERS[wire].__self__.type


def structs(kind: Any) -> set[type]:
    """Return all structs within a type, recursively."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return {kind}.union(*(structs(field) for field in get_type_hints(kind).values()))
    return set().union(*(structs(arg) for arg in get_args(kind)))


def test_every_message_has_a_decoder():
    reached = set().union(*(structs(decoded_type(wire)) for wire in DECODERS))
    defined = {x for x in vars(m).values() if isinstance(x, type) and issubclass(x, m.Struct) and x is not m.Struct}
    assert defined == reached


@each_wire
@given(data=st.data())
def test_round_trip(wire: str, data: st.DataObject):
    message = data.draw(values_of(decoded_type(wire)))
    assert DECODERS[wire](m.encode(message)) == message
    assert DECODERS[wire](memoryview(m.encode(message))) == message  # a view, as in a ring


@each_wire
@settings(max_examples=200)
@given(data=st.data())
def test_other_bytes_raise_a_decode_error(wire: str, data: st.DataObject):
    """Random bytes, and messages with one byte changed or truncated."""
    wrong = bytearray(m.encode(data.draw(values_of(decoded_type(wire)))))
    match data.draw(st.sampled_from(("random", "changed", "cut"))):
        case "random":
            wrong = bytearray(data.draw(st.binary(max_size=80)))
        case "changed":
            wrong[data.draw(st.integers(0, len(wrong) - 1))] = data.draw(st.integers(0, 255))
        case "cut":
            del wrong[data.draw(st.integers(0, len(wrong) - 1)) :]
    with suppress(msgspec.DecodeError, UnicodeDecodeError):  # the second: a string that is not UTF-8
        DECODERS[wire](wrong)


@each_wire
def test_other_msgpack_values_raise_a_decode_error(wire: str):
    for content in (None, 7, [], [99], [99, 1, 2], {"rid": 1}, ["x"] * 30):
        with pytest.raises(msgspec.DecodeError):
            DECODERS[wire](msgspec.msgpack.encode(content))


def test_sampling_is_greedy_only_at_temperature_zero():
    assert m.SamplingParams(1, 2, temperature=0.0).greedy
    assert not m.SamplingParams(1, 2, temperature=0.01).greedy
