"""Host buffers that the device still reads are not used again, and packed arrays do not overlap."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from daemon.engine.cuda.staging import Field, HostStream, Packed, RoundRobin, host_memory
from tests.engine.cuda.harness import LateStream

DTYPES = st.sampled_from(["int32", "int64", "float32", "float64"])


@given(st.lists(st.tuples(DTYPES, st.integers(0, 9)), min_size=1, max_size=8))
def test_packed_arrays_are_disjoint_and_aligned(shapes):
    packed = Packed([Field(str(i), dtype, length) for i, (dtype, length) in enumerate(shapes)])
    memory = host_memory(packed.nbytes, pinned=False)
    views = packed.tensors(memory)
    for i, (dtype, length) in enumerate(shapes):
        view = views[str(i)]
        assert view.numpy().dtype == dtype and view.shape == (length,)
        assert (view.data_ptr() - memory.data_ptr()) % 16 == 0
        view.fill_(i + 1)
    for i in range(len(shapes)):
        assert bool((views[str(i)] == i + 1).all())


@given(st.integers(0, 20), st.integers(0, 20))
def test_used_bytes_cover_all_arrays_and_a_part_of_the_last(first, last):
    packed = Packed([Field("first", "int64", first), Field("last", "int32", 20)])
    source, target = (host_memory(packed.nbytes, pinned=False) for _ in range(2))
    for view in packed.tensors(source).values():
        view.fill_(7)
    target[: packed.used(last)] = source[: packed.used(last)]
    assert bool((packed.tensors(target)["first"] == 7).all())
    assert (packed.tensors(target)["last"] == 7).tolist() == [i < last for i in range(20)]


def test_a_set_is_used_again_only_after_its_last_use():
    stream, seen = LateStream(), []
    rotation = RoundRobin([np.zeros(1), np.zeros(1)])
    for step in range(6):
        staged = rotation.acquire()
        staged[0] = step
        stream.submit(lambda staged=staged: seen.append(staged[0]))
        rotation.release_at(stream.record_event())
    assert seen == [0, 1, 2, 3]  # the last two uses are still pending
    stream.record_event().wait()
    assert seen == list(range(6))


def test_the_current_set_stays_until_it_is_used():
    rotation = RoundRobin([1, 2])
    assert [rotation.acquire() for _ in range(3)] == [1, 1, 1]
    rotation.release_at(HostStream().record_event())
    assert [rotation.acquire() for _ in range(3)] == [2, 2, 2]


def test_the_host_stream_runs_work_at_once():
    stream, done = HostStream(), []
    stream.submit(lambda: done.append(torch.ones(1)))
    assert len(done) == 1
    stream.record_event().wait()
