"""The statement of what an engine owns, in parts that fit a ring."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from daemon.control.policy.ownership import Ownership, owned_requests
from daemon.ipc.fabric import COMMAND_RING
from daemon.ipc.messages import EngineIncarnation, encode
from daemon.ipc.ring import largest_payload

LAST = (1 << 64) - 1
OWNER = EngineIncarnation(0, 1)


@given(st.sets(st.integers(0, LAST), max_size=30), st.integers(0, 5))
def test_every_id_is_spoken_of_exactly_once(rids: set[int], accepted: int):
    messages = owned_requests(Ownership(rid, 1, OWNER, accepted) for rid in rids)
    assert [rid for m in messages for rid in m.rids] == sorted(rids)
    assert messages[0].first == 0 and messages[-1].last == LAST
    for message, following in pairwise(messages):
        assert message.last + 1 == following.first
    assert all(m.first <= rid <= m.last for m in messages for rid in m.rids)


def test_many_requests_fit_the_ring_in_parts():
    owned = [Ownership(LAST - n, 2**32 - 1, OWNER, 2**32 - 1, -(2**63)) for n in range(5000)]
    messages = owned_requests(owned)
    assert [len(m.rids) for m in messages] == [2000, 2000, 1000]
    assert all(len(encode(m)) < largest_payload(COMMAND_RING) for m in messages)
    assert [(a.last + 1) - b.first for a, b in pairwise(messages)] == [0, 0]
