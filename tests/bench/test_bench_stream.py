"""Reading streams: HTTP and server-sent events, cut anywhere; and what counts as a failure."""

import asyncio
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.connection import Connection
from bench.stream import EventSplitter, Outcome, StreamReader


def cut(data: bytes, at: list[int]) -> list[bytes]:
    places = sorted({0, len(data), *(i % (len(data) + 1) for i in at)})
    return [data[a:b] for a, b in pairwise(places)]


cuts = st.lists(st.integers(0, 10_000), max_size=12)
payloads = st.lists(st.text(st.characters(blacklist_characters="\r\n", blacklist_categories=("Cs",)), min_size=1))


@given(payloads, cuts, st.sampled_from(["\n", "\r\n"]))
def test_events_do_not_depend_on_where_the_bytes_are_cut(texts, at, newline):
    wire = "".join(f": beat{newline}{newline}event: x{newline}data: {t}{newline}{newline}" for t in texts).encode()
    splitter = EventSplitter()
    assert [e for piece in cut(wire, at) for e in splitter.feed(piece)] == [t.encode() for t in texts]


def test_data_lines_of_one_event_are_joined_and_the_space_is_optional():
    assert EventSplitter().feed(b"data:a\ndata: b\n\ndata: tail\n") == [b"a\nb"]


class Wire:
    """Stands in for a socket's transport."""

    closing = False

    def write(self, data):
        pass

    def is_closing(self):
        return self.closing

    def close(self):
        self.closing = True


def receive(pieces: list[bytes], *, then_close: bool = False):
    """(status or error, body, connection) after `pieces` arrived."""

    async def go():
        connection, body = Connection(), []
        connection.connection_made(Wire())
        future = connection.exchange(b"", lambda now, piece: body.append(piece))
        for piece in pieces:
            connection.data_received(piece)
        if then_close:
            connection.connection_lost(None)
        assert future.done()
        return future.exception() or future.result(), b"".join(body), connection

    return asyncio.run(go())


@given(st.lists(st.binary(min_size=1, max_size=50), max_size=8), cuts)
def test_a_chunked_body_does_not_depend_on_where_the_bytes_are_cut(chunks, at):
    coded = b"".join(b"%x;ext=1\r\n%s\r\n" % (len(c), c) for c in chunks)
    wire = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + coded + b"0\r\n\r\n"
    status, body, connection = receive(cut(wire, at))
    assert (status, body, connection.reusable) == (200, b"".join(chunks), True)


@given(st.binary(max_size=80), cuts)
def test_a_body_of_known_length_does_not_depend_on_where_the_bytes_are_cut(body, at):
    wire = b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: %d\r\nConnection: close\r\n\r\n" % len(body) + body
    status, heard, connection = receive(cut(wire, at))
    assert (status, heard, connection.reusable) == (429, body, False)


def test_a_body_may_end_with_the_connection_but_a_chunked_one_may_not():
    assert receive([b"HTTP/1.1 200 OK\r\n\r\nab", b"c"], then_close=True)[:2] == (200, b"abc")
    error, body, _ = receive([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n"], then_close=True)
    assert isinstance(error, ConnectionError) and body == b"a"


@pytest.mark.parametrize(
    "wire",
    [b"SSH-2.0-x\r\n\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", b"HTTP/1.1\r\n\r\n"],
)
def test_what_is_not_http_fails_the_exchange_and_closes(wire):
    error, _, connection = receive([wire])
    assert isinstance(error, ConnectionError) and connection.closed


def read(*events: str, status: int = 200) -> Outcome:
    """The outcome of events that arrive one second apart, sent at 0."""
    reader = StreamReader(Outcome(0))
    for now, event in enumerate(events, 1):
        reader.feed(float(now), f"data: {event}\n\n".encode())
    reader.end(float(len(events)), status)
    return reader.outcome


def text(t: str, usage: int | None = None) -> str:
    told = "" if usage is None else f', "usage": {{"prompt_tokens": 7, "completion_tokens": {usage}}}'
    return f'{{"choices": [{{"index": 0, "delta": {{"content": "{t}"}}}}]{told}}}'


ROLE = '{"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}'
STOP = '{"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]}'
USAGE = '{"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 5}}'


def test_latencies_count_text_only_and_tokens_come_from_usage():
    o = read(ROLE, text("a"), text("b"), text("c"), STOP, USAGE, "[DONE]")
    assert (o.error, o.ttft, o.gaps, o.e2e, o.output_tokens, o.finish) == ("", 2.0, [1.0, 1.0], 7.0, 5, "length")
    assert o.gap_tokens == pytest.approx([5 / 3, 5 / 3])
    assert o.tpot == pytest.approx(2.0 / (5 - 5 / 3))


def test_reported_usage_says_how_many_tokens_each_chunk_carried():
    o = read(ROLE, text("a", 1), text("bcd", 4), text("e", 5), STOP, USAGE, "[DONE]")
    assert (o.gap_tokens, o.tpot) == ([3.0, 1.0], 0.5)


def test_without_usage_chunks_are_counted():
    assert read(text("a"), text("b"), STOP, "[DONE]").output_tokens == 2


def test_completions_and_their_logprobs_are_read_too():
    chunk = '{"choices": [{"text": "hi", "finish_reason": "stop", "logprobs": {"tokens": ["h", "i"]}}]}'
    o = read(chunk, "[DONE]")
    assert (o.error, o.text, o.tokens, o.tpot) == ("", ["hi"], ["h", "i"], None)


def test_a_digest_tells_answers_apart_and_sees_token_boundaries():
    a, b = Outcome(0, tokens=["ab", "c"]), Outcome(0, tokens=["a", "bc"])
    assert a.digest() != b.digest()
    assert Outcome(0, text=["ab", "c"]).digest() == Outcome(1, text=["a", "bc"]).digest()


@pytest.mark.parametrize(
    ("events", "kind"),
    [
        ([text("a"), STOP], "no [DONE]"),
        ([text("a"), "[DONE]"], "no finish_reason"),
        ([STOP, "[DONE]"], "no text"),
        ([text("a"), '{"error": {"message": "engine lost"}}'], "error event"),
        ([text("a"), "{not json", STOP, "[DONE]"], "unreadable event"),
    ],
)
def test_an_incomplete_stream_is_a_failure(events, kind):
    assert read(*events).error == kind


def test_any_status_but_200_is_a_failure():
    assert read('{"error": {"message": "busy"}}', status=429).error == "HTTP 429"
