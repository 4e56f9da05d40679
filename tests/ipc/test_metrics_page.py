"""Metrics pages: their sums, their tables, and that they outlive their writer."""

from __future__ import annotations

import multiprocessing as mp
from multiprocessing import shared_memory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.ipc.metrics_page import ENGINE, FRONTEND, Counter, Histogram, MetricsPage, Table, snapshot

TABLE = Table(
    [Counter("a", ""), Counter("b", "", (("x", ("1", "2")), ("y", ("p", "q"))))],
    [Histogram("h", "", (1.0, 2.0)), Histogram("k", "", (0.5,))],
)
SERIES = [("a",), *(("b", x, y) for x in "12" for y in "pq")]


@given(
    st.lists(st.tuples(st.sampled_from(SERIES), st.integers(0, 1000))),
    st.lists(st.tuples(st.sampled_from("hk"), st.floats(0, 5), st.integers(1, 4))),
)
def test_a_page_has_the_sums_of_all_increments_and_observations(increments, observations):
    memory = bytearray(TABLE.nbytes + 8)  # a page may be larger than its table
    page = MetricsPage(memoryview(memory), TABLE)
    for (name, *values), amount in increments:
        page.inc(name, amount, *values)
    for name, value, times in observations:
        page.observe(name, value, times)
    seen = snapshot(memoryview(memory), TABLE)
    for name, *values in SERIES:
        assert seen.counter(name, *values) == sum(a for key, a in increments if key == (name, *values))
    for name, bounds in (("h", [1.0, 2.0]), ("k", [0.5])):
        mine = [(v, t) for n, v, t in observations if n == name]
        at_most = [sum(t for v, t in mine if v <= b) for b in bounds]
        found = seen.histogram(name)
        assert [sum(found.counts[: i + 1]) for i in range(len(bounds))] == at_most
        assert sum(found.counts) == sum(t for _, t in mine)
        assert found.sum == pytest.approx(sum(v * t for v, t in mine))
    assert bytes(memory[TABLE.nbytes :]) == bytes(8)


def test_an_unknown_series_raises_key_error():
    page = MetricsPage(memoryview(bytearray(TABLE.nbytes)), TABLE)
    for call in (lambda: page.inc("c"), lambda: page.inc("b"), lambda: page.observe("a", 1)):
        with pytest.raises(KeyError):
            call()


def test_tables_have_unique_names_and_ascending_buckets():
    for table in (FRONTEND, ENGINE):
        names = [c.name for c in table.counters] + [h.name for h in table.histograms]
        assert len(names) == len(set(names))
        assert all(list(h.buckets) == sorted(set(h.buckets)) for h in table.histograms)
        zeros = snapshot(memoryview(bytearray(table.nbytes)), table)
        assert {zeros.counter(*series) for series in table.counter_cells} == {0.0}


def _count(name: str, times: int) -> None:
    memory = shared_memory.SharedMemory(name)
    page = MetricsPage(memory.buf, TABLE)
    for _ in range(times):
        page.inc("a")
    del page  # its views would keep the memory open
    memory.close()


def test_a_page_outlives_its_writer():
    memory = shared_memory.SharedMemory(create=True, size=4096)
    try:
        for _ in range(2):
            writer = mp.get_context("spawn").Process(target=_count, args=(memory.name, 500))
            writer.start()
            writer.join(30)
            assert writer.exitcode == 0
        assert snapshot(memory.buf, TABLE).counter("a") == 1000
    finally:
        memory.close()
        memory.unlink()
