"""Projection: the facts of engines once they have reached their desired states."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from daemon.control.policy.projection import emptied, project
from daemon.ipc.messages import EngineFacts, EngineState
from tests.control.factories import engine_facts

SERVING, DRAINING, PARKED = EngineState.SERVING, EngineState.DRAINING, EngineState.PARKED

some_facts = st.none() | st.builds(
    engine_facts,
    running=st.integers(0, 9),
    waiting=st.integers(0, 9),
    used_blocks=st.integers(0, 99),
    pending_prefill_tokens=st.integers(0, 999),
    state=st.sampled_from([SERVING, DRAINING, PARKED]),
)


@given(st.lists(st.tuples(some_facts, some_facts, st.sampled_from([SERVING, DRAINING, PARKED])), max_size=5))
def test_each_engine_is_projected_to_its_desired_state(
    rows: list[tuple[EngineFacts | None, EngineFacts | None, EngineState]],
):
    facts = [now for now, _, _ in rows]
    predecessors = [last for _, last, _ in rows]
    projected = project(facts, predecessors, [desired for _, _, desired in rows])
    for found, (now, last, desired) in zip(projected, rows, strict=True):
        if found is None:
            assert now is None and last is None
            continue
        assert found.state == desired
        if now is not None:
            assert (found.running, found.used_blocks) == (now.running, now.used_blocks)
        else:
            assert not (found.running or found.waiting or found.used_blocks or found.pending_prefill_tokens)
            assert last is not None and found.total_blocks == last.total_blocks


def test_an_emptied_engine_holds_nothing():
    """Every field is 0, unless it describes the engine itself and its speed."""
    full = EngineFacts(**{name: 7 for name in EngineFacts.__struct_fields__} | {"consumed": []})
    left = {name for name in EngineFacts.__struct_fields__ if getattr(emptied(full, PARKED), name) == 7}
    assert left == {
        *("incarnation", "step", "time", "block_size", "total_blocks", "max_num_seqs", "max_model_len"),
        *("step_seconds", "knee", "ideal_tokens", "step_times", "cost_group", "fingerprint", "weights"),
    }
