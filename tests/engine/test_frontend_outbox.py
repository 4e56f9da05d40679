"""Rows that wait for a full ring are merged, and arrive complete and in order."""

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
from daemon.ipc.prompt_logprobs import PromptLogprobs
from daemon.ipc.ring import RingReader, RingWriter, ring_bytes

RECEIVER = 9


def make_request(rid: int, epoch: int = 1, cached: int = 0) -> Request:
    params = RequestParams(SamplingParams(max_tokens=10**6, seed=0), 0.0)
    return Request(rid, epoch, 0, params, [1], 1, num_cached=cached)


def make_outbox(capacity: int) -> tuple[FrontendOutbox, RingReader]:
    memory = memoryview(bytearray(ring_bytes(capacity)))
    made = FrontendOutbox(RingWriter(memory, 1))
    made.readdress(RECEIVER)
    return made, RingReader(memory)


def read_messages(reader: RingReader) -> list[StepOutput | Refused]:
    found = []
    while (record := reader.read()) is not None:
        assert record.receiver == RECEIVER
        found.append(decode_to_frontend(record.payload))
    reader.ack()
    return found


def test_columns_hold_what_the_rows_held():
    outbox, reader = make_outbox(1 << 16)
    a, b = make_request(1, epoch=4, cached=32), make_request(2)
    entry = TokenLogprobs(-0.5, [7, 8], [-0.5, -1.5])
    outbox.emit(Emission(a, 3, [70, 71], Finish.NONE, [entry, entry]))
    outbox.emit(Emission(b, 0, [], Finish.ERROR, None))
    outbox.emit(Emission(b, 0, [5], Finish.STOP, None))
    assert outbox.flush()
    assert read_messages(reader) == [
        StepOutput(rids=[1, 2, 2], epochs=[4, 1, 1], starts=[3, 0, 0], counts=[2, 0, 1], tokens=[70, 71, 5],
                   finishes=[Finish.NONE, Finish.ERROR, Finish.STOP], cached=[32, 0, 0],
                   logprobs=[entry, entry, None])
    ]  # fmt: skip
    assert not outbox.flush()


def test_without_logprobs_in_any_row_there_is_no_column():
    outbox, reader = make_outbox(1 << 16)
    outbox.emit(Emission(make_request(1), 0, [5], Finish.NONE, None))
    outbox.flush()
    assert read_messages(reader)[0].logprobs is None


def test_rows_of_several_steps_are_merged_while_the_ring_is_full():
    outbox, reader = make_outbox(4096)
    r, sent = make_request(1), 0
    while True:  # one record per step until the ring is full
        outbox.emit(Emission(r, sent, [sent], Finish.NONE, None))
        sent += 1
        if not outbox.flush():
            break
    for _ in range(50):
        outbox.emit(Emission(r, sent, [sent], Finish.NONE, None))
        sent += 1
        assert not outbox.flush()
    before = read_messages(reader)
    assert all(len(m.rids) == 1 for m in before)
    assert outbox.flush()
    (merged,) = read_messages(reader)
    assert len(merged.rids) == 51
    assert [t for m in (*before, merged) for t in m.tokens] == list(range(sent))


def test_the_largest_step_fits_a_ring():
    """512 rows with 20 alternatives each fit one record; more rows take a second record."""
    outbox, reader = make_outbox(1 << 20)
    entry = TokenLogprobs(-1.25, list(range(2**31, 2**31 + 20)), [-1.1 * n for n in range(20)])
    for n in range(1100):
        outbox.emit(Emission(make_request(n + (1 << 40)), 10**6, [2**31], Finish.NONE, [entry]))
    received: list[int] = []
    while outbox.flush():
        for message in read_messages(reader):
            received += message.rids
    assert received == [n + (1 << 40) for n in range(1100)]


def test_the_logprobs_of_a_long_prompt_fit_a_ring_in_pieces():
    """They come in order and once, before the tokens of the same emission, and beside the rows of other requests."""
    outbox, reader = make_outbox(1 << 20)
    params = RequestParams(SamplingParams(max_tokens=9, seed=0, prompt_logprobs=20), 0.0)
    records = bytes(range(256)) * (20_000 * 168 // 256)
    long = Request(1, 1, 0, params, [1] * 20_001, 20_001)
    outbox.emit(Emission(make_request(2), 0, [5], Finish.NONE, None))
    outbox.emit(Emission(long, 0, [8], Finish.LENGTH, None, PromptLogprobs(100, records)))
    outbox.emit(Emission(make_request(3), 4, [6], Finish.NONE, None))
    rows, found = [], b""
    while outbox.flush():
        for m in read_messages(reader):
            begin = 0
            for i, (rid, count, finish) in enumerate(zip(m.rids, m.counts, m.finishes, strict=True)):
                if (part := (m.prompt_logprobs or {}).get(i)) is not None:
                    assert rid == 1 and part.start == 100 + len(found) // 168
                    found += part.records
                rows.append((rid, m.tokens[begin : begin + count], finish, len(found)))
                begin += count
    assert found == records
    assert [row for row in rows if row[1]] == [
        (2, [5], Finish.NONE, 0), (1, [8], Finish.LENGTH, len(records)), (3, [6], Finish.NONE, len(records))
    ]  # fmt: skip


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
    """Whenever the reader reads, each request's rows arrive in order, and each refusal once."""
    outbox, reader = make_outbox(2048)
    requests = {rid: make_request(rid) for rid in range(1, 6)}
    sent: dict[int, list[int]] = {rid: [] for rid in requests}
    refused: list[int] = []
    received: list[StepOutput | Refused] = []
    for operation, *args in script:
        if operation == "emit":
            rid, n = args
            start = len(sent[rid])
            tokens = list(range(start, start + n))
            outbox.emit(Emission(requests[rid], start, tokens, Finish.NONE, None))
            sent[rid] += tokens
        elif operation == "refuse":
            outbox.tell(Refused(args[0], 1, "too long"))
            refused += args
        elif operation == "flush":
            outbox.flush()
        else:
            received += read_messages(reader)
    received += read_messages(reader)
    while outbox.flush():
        received += read_messages(reader)
    got: dict[int, list[int]] = {rid: [] for rid in requests}
    for message in received:
        if isinstance(message, Refused):
            continue
        tokens = iter(message.tokens)
        for rid, start, n in zip(message.rids, message.starts, message.counts, strict=True):
            assert start == len(got[rid])
            got[rid] += [next(tokens) for _ in range(n)]
    assert got == sent
    assert [m.rid for m in received if isinstance(m, Refused)] == refused
