"""Every message comes back as it went; a decoder turns away anything else with an error and nothing worse."""

from __future__ import annotations

from contextlib import suppress

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.control import messages as m
from tests.control.facts import engine, frontend

u32, u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
reals = st.floats(allow_nan=False)
ids = st.lists(u32, max_size=5)
logprobs = st.builds(m.TokenLogprobs, reals, ids, st.lists(reals, max_size=5))
sampling = st.builds(
    m.SamplingParams,
    max_tokens=u32,
    seed=u64,
    temperature=reals,
    top_k=u32,
    top_p=reals,
    ignore_eos=st.booleans(),
    stop_token_ids=ids.map(tuple),
    logit_bias=st.lists(st.tuples(u32, reals), max_size=3).map(tuple),
    logprobs=st.integers(-1, 20),
)
params = st.builds(m.RequestParams, sampling, reals, st.integers(-9, 9), st.binary(max_size=9), st.text(max_size=9))
steps = st.builds(
    m.StepOutput, *[st.lists(u64, max_size=4)] * 7,
    logprobs=st.none() | st.lists(st.none() | logprobs, max_size=4),
)  # fmt: skip
demands = st.builds(m.Demand, u32, u64, u64)
engines = st.builds(engine, incarnation=u32, time=reals, consumed=st.lists(demands, max_size=4))
frontends = st.lists(demands, max_size=4).map(lambda sent: frontend(*sent))

WIRES = {
    "to_engine": (
        m.decode_to_engine,
        st.one_of(
            st.builds(m.Start, u64, u32, u32, u32),
            st.builds(m.Cancel, u64, u32),
            st.builds(m.Statement, st.lists(u64), st.lists(u32)),
        ),
    ),
    "to_frontend": (m.decode_to_frontend, st.one_of(steps, st.builds(m.Refused, u64, u32, st.text()))),
    "from_coordinator": (m.decode_from_coordinator, st.builds(m.CancelRequest, u64)),
    "params": (m.decode_params, params),
    "engine_facts": (m.decode_engine_facts, engines),
    "frontend_facts": (m.decode_frontend_facts, frontends),
}
each_wire = pytest.mark.parametrize("wire", WIRES)


def test_no_message_is_forgotten():
    tested = {m.Start, m.Cancel, m.Statement, m.StepOutput, m.Refused, m.CancelRequest, m.TokenLogprobs,
              m.SamplingParams, m.RequestParams, m.Demand, m.EngineFacts, m.FrontendFacts}  # fmt: skip
    structs = {x for x in vars(m).values() if isinstance(x, type) and issubclass(x, m.Struct) and x is not m.Struct}
    assert structs == tested


@each_wire
@given(data=st.data())
def test_round_trip(wire: str, data: st.DataObject):
    decode, some = WIRES[wire]
    message = data.draw(some)
    assert decode(m.encode(message)) == message
    assert decode(memoryview(m.encode(message))) == message  # as it lies in a ring


@each_wire
@settings(max_examples=200)
@given(data=st.data())
def test_other_bytes_are_refused(wire: str, data: st.DataObject):
    """Random bytes, and good messages with a byte changed or cut off."""
    decode, some = WIRES[wire]
    good = bytearray(m.encode(data.draw(some)))
    match data.draw(st.sampled_from(("random", "changed", "cut"))):
        case "random":
            good = bytearray(data.draw(st.binary(max_size=80)))
        case "changed":
            good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
        case "cut":
            del good[data.draw(st.integers(0, len(good) - 1)) :]
    with suppress(msgspec.DecodeError, UnicodeDecodeError):  # the second: a string that is not UTF-8
        decode(good)


@given(st.lists(st.integers(-(2**70), 2**70), min_size=1, max_size=3))
def test_unknown_tags_are_refused(numbers: list[int]):
    for decode in (m.decode_to_engine, m.decode_to_frontend, m.decode_from_coordinator):
        with pytest.raises(msgspec.DecodeError):
            decode(msgspec.msgpack.encode([99, *(n % 2**64 for n in numbers)]))


def test_greedy():
    assert m.SamplingParams(1, 2, temperature=0.0).greedy
    assert not m.SamplingParams(1, 2, temperature=0.01).greedy
