"""What waits for a full ring is merged, and arrives whole and in order."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.engine.frontend_outbox import FrontendOutbox
from daemon.engine.request import Request
from daemon.engine.scheduler import Emission
from daemon.ipc.messages import (
    Finish,
    Refused,
    RequestParams,
    SamplingParams,
    StepOutput,
    TokenLogprobs,
    decode_to_frontend,
)
from daemon.ipc.ring import RingReader, RingWriter, ring_bytes

PEER = 9


def request(rid: int, epoch: int = 1, cached: int = 0) -> Request:
    params = RequestParams(SamplingParams(max_tokens=10**6, seed=0), 0.0)
    return Request(rid, epoch, 0, params, [1], 1, num_cached=cached)


def outbox(capacity: int) -> tuple[FrontendOutbox, RingReader]:
    memory = memoryview(bytearray(ring_bytes(capacity)))
    made = FrontendOutbox(RingWriter(memory, 1))
    made.forget(PEER)
    return made, RingReader(memory)


def messages(reader: RingReader) -> list[StepOutput | Refused]:
    found = []
    while (record := reader.read()) is not None:
        assert record.receiver == PEER
        found.append(decode_to_frontend(record.payload))
    reader.ack()
    return found


def test_columns_say_what_the_rows_said():
    box, reader = outbox(1 << 16)
    a, b = request(1, epoch=4, cached=32), request(2)
    entry = TokenLogprobs(-0.5, [7, 8], [-0.5, -1.5])
    box.emit(Emission(a, 3, [70, 71], Finish.NONE, [entry, entry]))
    box.emit(Emission(b, 0, [], Finish.ERROR, None))
    box.emit(Emission(b, 0, [5], Finish.STOP, None))
    assert box.flush()
    assert messages(reader) == [
        StepOutput(rids=[1, 2, 2], epochs=[4, 1, 1], starts=[3, 0, 0], counts=[2, 0, 1], tokens=[70, 71, 5],
                   finishes=[Finish.NONE, Finish.ERROR, Finish.STOP], cached=[32, 0, 0],
                   logprobs=[entry, entry, None])
    ]  # fmt: skip
    assert not box.flush()


def test_no_row_with_logprobs_means_no_column():
    box, reader = outbox(1 << 16)
    box.emit(Emission(request(1), 0, [5], Finish.NONE, None))
    box.flush()
    assert messages(reader)[0].logprobs is None


def test_a_full_ring_merges_steps():
    box, reader = outbox(4096)
    r, sent = request(1), 0
    while True:  # one record a step until the ring is full
        box.emit(Emission(r, sent, [sent], Finish.NONE, None))
        sent += 1
        if not box.flush():
            break
    for _ in range(50):
        box.emit(Emission(r, sent, [sent], Finish.NONE, None))
        sent += 1
        assert not box.flush()
    before = messages(reader)
    assert all(len(m.rids) == 1 for m in before)
    assert box.flush()
    (merged,) = messages(reader)
    assert len(merged.rids) == 51
    assert [t for m in (*before, merged) for t in m.tokens] == list(range(sent))


def test_the_largest_step_fits_a_ring():
    """512 rows with 20 alternatives each go as one record; more take a second."""
    box, reader = outbox(1 << 20)
    entry = TokenLogprobs(-1.25, list(range(2**31, 2**31 + 20)), [-1.1 * n for n in range(20)])
    for n in range(1100):
        box.emit(Emission(request(n + (1 << 40)), 10**6, [2**31], Finish.NONE, [entry]))
    heard: list[int] = []
    while box.flush():
        for message in messages(reader):
            heard += message.rids
    assert heard == [n + (1 << 40) for n in range(1100)]


script = st.lists(
    st.one_of(
        st.tuples(st.just("emit"), st.integers(1, 5), st.integers(0, 40)),
        st.just(("flush",)),
        st.just(("read",)),
        st.tuples(st.just("refuse"), st.integers(100, 999)),
    ),
    max_size=80,
)


@settings(deadline=None)
@given(script)
def test_nothing_is_lost_or_reordered(script: list[tuple]):
    """Whatever the reader does meanwhile, each request's rows arrive in order, and each refusal once."""
    box, reader = outbox(2048)
    requests = {rid: request(rid) for rid in range(1, 6)}
    sent: dict[int, list[int]] = {rid: [] for rid in requests}
    refused: list[int] = []
    heard: list[StepOutput | Refused] = []
    for verb, *args in script:
        if verb == "emit":
            rid, n = args
            start = len(sent[rid])
            tokens = list(range(start, start + n))
            box.emit(Emission(requests[rid], start, tokens, Finish.NONE, None))
            sent[rid] += tokens
        elif verb == "refuse":
            box.tell(Refused(args[0], 1, "too long"))
            refused += args
        elif verb == "flush":
            box.flush()
        else:
            heard += messages(reader)
    heard += messages(reader)
    while box.flush():
        heard += messages(reader)
    got: dict[int, list[int]] = {rid: [] for rid in requests}
    for message in heard:
        if isinstance(message, Refused):
            continue
        tokens = iter(message.tokens)
        for rid, start, n in zip(message.rids, message.starts, message.counts, strict=True):
            assert start == len(got[rid])
            got[rid] += [next(tokens) for _ in range(n)]
    assert got == sent
    assert [m.rid for m in heard if isinstance(m, Refused)] == refused
