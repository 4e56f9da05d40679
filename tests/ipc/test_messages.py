"""Every message comes back as it went; a decoder turns away anything else with an error and nothing worse."""

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


def of(kind: Any) -> st.SearchStrategy[Any]:
    """Values of a type as messages use it."""
    if kind in PLAIN:
        return PLAIN[kind]
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return st.builds(kind, **{name: of(field) for name, field in get_type_hints(kind).items()})
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return st.one_of(*map(of, args))
    if origin is list:
        return st.lists(of(args[0]), max_size=4)
    assert origin is tuple, kind
    return st.lists(of(args[0]), max_size=4).map(tuple) if args[1:] == (...,) else st.tuples(*map(of, args))


def carried(wire: str) -> Any:
    """The type, a message or a union of them, that a decoder gives."""
    return DECODERS[wire].__self__.type


def structs(kind: Any) -> set[type]:
    """All messages and their parts within a type."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return {kind}.union(*(structs(field) for field in get_type_hints(kind).values()))
    return set().union(*(structs(arg) for arg in get_args(kind)))


def test_every_message_has_a_decoder():
    reached = set().union(*(structs(carried(wire)) for wire in DECODERS))
    defined = {x for x in vars(m).values() if isinstance(x, type) and issubclass(x, m.Struct) and x is not m.Struct}
    assert defined == reached


@each_wire
@given(data=st.data())
def test_round_trip(wire: str, data: st.DataObject):
    message = data.draw(of(carried(wire)))
    assert DECODERS[wire](m.encode(message)) == message
    assert DECODERS[wire](memoryview(m.encode(message))) == message  # as it lies in a ring


@each_wire
@settings(max_examples=200)
@given(data=st.data())
def test_other_bytes_are_refused(wire: str, data: st.DataObject):
    """Random bytes, and good messages with a byte changed or cut off."""
    wrong = bytearray(m.encode(data.draw(of(carried(wire)))))
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
def test_nonsense_is_an_error(wire: str):
    for content in (None, 7, [], [99], [99, 1, 2], {"rid": 1}, ["x"] * 30):
        with pytest.raises(msgspec.DecodeError):
            DECODERS[wire](msgspec.msgpack.encode(content))


def test_greedy():
    assert m.SamplingParams(1, 2, temperature=0.0).greedy
    assert not m.SamplingParams(1, 2, temperature=0.01).greedy
