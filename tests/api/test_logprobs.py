"""Logprobs of both formats: JSON that is encoded piece by piece."""

from __future__ import annotations

import json
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.api.logprobs import ChatLogprobs, TextLogprobs
from daemon.ipc.messages import TokenLogprobs


class Texts:
    """Names of tokens that JSON must escape."""

    def token_bytes(self, token: int) -> bytes:
        return self.token_text(token).encode()

    def token_text(self, token: int) -> str:
        return ('"', "\\", "\n", "é", "🙂", "],[", "x")[token % 7] * (token // 7 % 3 + 1)


class Shown:
    def push(self, tokens: Sequence[int]) -> str:
        return "".join(map(Texts().token_text, tokens))


TOP = 2
ENTRY = st.one_of(
    st.none(),
    st.builds(
        TokenLogprobs,
        st.floats(max_value=0, width=32),
        st.lists(st.integers(0, 40), min_size=TOP, max_size=TOP),
        st.lists(st.floats(-9, 0, width=32), min_size=TOP, max_size=TOP),
    ),
)
CHUNKS = st.lists(st.lists(st.tuples(st.integers(0, 40), ENTRY), max_size=4), max_size=6)


def _formats() -> list[ChatLogprobs | TextLogprobs]:
    return [
        ChatLogprobs(Texts()),
        ChatLogprobs(Texts(), ids=True),
        TextLogprobs(Texts(), Shown(), TOP),
        TextLogprobs(Texts(), Shown(), 0),
    ]


@pytest.mark.parametrize("which", range(4))
@given(chunks=CHUNKS)
def test_pieces_join_to_the_json_of_the_whole(which, chunks):
    whole, pieces, events = (_formats()[which] for _ in range(3))
    whole.add([token for chunk in chunks for token, _ in chunk], [entry for chunk in chunks for _, entry in chunk])
    parts = []
    for chunk in chunks:
        for format in (pieces, events):
            format.add([token for token, _ in chunk], [entry for _, entry in chunk])
        if (taken := events.take()) is not None:
            parts.append(json.loads(bytes(taken)))
    expected, joined = whole.take(), pieces.take()
    if expected is None:
        assert joined is None and parts == []
        return
    assert bytes(joined) == bytes(expected)
    found = json.loads(msgspec.json.encode({"logprobs": joined}))["logprobs"]
    for name, values in found.items():
        streamed = [part[name] for part in parts]
        assert values == (None if values is None else [one for part in streamed for one in part])
    assert len(next(iter(found.values()))) == sum(map(len, chunks))
    assert pieces.take() is None


def test_a_format_keeps_bytes_and_no_entries():
    for format in _formats():
        format.add([1], [TokenLogprobs(-0.5, [1, 2], [-0.5, -1.0])])
        kept = [getattr(format, name) for name in vars(format)]
        assert not any(isinstance(value, list | dict) for value in kept)
