"""The metrics page: counters, gauges and histograms of one process, as float64 cells in shared memory.

One process writes a page, by plain aligned 8-byte stores; every process can read it at any time. The page outlives
its writer, so a restarted process continues the counts of its predecessor. A `Table` defines the layout; writer and
readers of a page use the same one.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from daemon.enums import ConnectionEnd, DispatchKind, MigrationReason, MigrationResult, Rejection

CELL = 8  # bytes


class Counter(NamedTuple):
    """A number that only grows; one cell for each combination of label values."""

    name: str
    help: str
    labels: tuple[tuple[str, tuple[str, ...]], ...] = ()  # (label, its values), ...

    def series(self) -> Iterator[tuple[str, ...]]:
        """Yield every combination of label values, in cell order; one empty combination if there are no labels."""
        return itertools.product(*(values for _, values in self.labels))


class Gauge(NamedTuple):
    """A number that its process sets. A restarted process sets it again at its start."""

    name: str
    help: str


class Histogram(NamedTuple):
    """Observations by size: one cell per bucket, one for values above the last bound, one for the sum."""

    name: str
    help: str
    buckets: tuple[float, ...]  # upper bounds, ascending, inclusive


class HistogramValue(NamedTuple):
    """The observations of a histogram: `counts[i]` are in bucket i only; the last count is above every bound."""

    counts: list[float]
    sum: float


class Table:
    """The layout of one kind of page: the cells of each counter, histogram and gauge."""

    def __init__(
        self, counters: Sequence[Counter], histograms: Sequence[Histogram], gauges: Sequence[Gauge] = ()
    ) -> None:
        self.counters = tuple(counters)
        self.gauges = tuple(gauges)
        self.histograms = tuple(histograms)
        self.counter_cells: dict[tuple[str, ...], int] = {}  # (name, *label values) -> cell
        self.histogram_cells: dict[str, tuple[int, tuple[float, ...]]] = {}  # name -> first cell, buckets
        cell = 0
        for counter in self.counters:
            for values in counter.series():
                self.counter_cells[counter.name, *values] = cell
                cell += 1
        for histogram in self.histograms:
            self.histogram_cells[histogram.name] = (cell, histogram.buckets)
            cell += len(histogram.buckets) + 2
        self.gauge_cells = {gauge.name: cell + i for i, gauge in enumerate(self.gauges)}
        cell += len(self.gauges)
        self.nbytes = cell * CELL


class MetricsPage:
    """The only writer of a page.

    `view` is writable, 8-byte aligned, at least `table.nbytes` long and was zeroed when it was created.
    """

    __slots__ = ("_cells", "_counters", "_gauges", "_histograms")

    def __init__(self, view: memoryview, table: Table) -> None:
        self._cells = view[: table.nbytes].cast("d")
        self._counters = table.counter_cells
        self._histograms = table.histogram_cells
        self._gauges = table.gauge_cells

    def inc(self, counter: str, amount: float = 1.0, *values: str) -> None:
        """Add `amount` to the counter with these label values. Raises KeyError if the table has no such series."""
        cell = self._counters[counter, *values]
        self._cells[cell] += amount

    def set(self, gauge: str, value: float) -> None:
        """Set a gauge. Raises KeyError if the table has no such gauge."""
        self._cells[self._gauges[gauge]] = value

    def observe(self, histogram: str, value: float, times: int = 1) -> None:
        """Add `times` observations of `value`. Raises KeyError if the table has no such histogram."""
        first, buckets = self._histograms[histogram]
        self._cells[first + bisect_left(buckets, value)] += times
        self._cells[first + len(buckets) + 1] += value * times


class Snapshot:
    """A copy of a page. Its cells may differ by the few observations that were written during the copy."""

    __slots__ = ("_cells", "table")

    def __init__(self, table: Table, cells: Sequence[float]) -> None:
        self.table = table
        self._cells = cells

    def counter(self, name: str, *values: str) -> float:
        return self._cells[self.table.counter_cells[name, *values]]

    def gauge(self, name: str) -> float:
        return self._cells[self.table.gauge_cells[name]]

    def histogram(self, name: str) -> HistogramValue:
        first, buckets = self.table.histogram_cells[name]
        last = first + len(buckets) + 1
        return HistogramValue(list(self._cells[first:last]), self._cells[last])


def snapshot(view: memoryview, table: Table) -> Snapshot:
    """Copy a page that another process may be writing."""
    with view[: table.nbytes].cast("d") as cells:
        return Snapshot(table, cells.tolist())


# Bucket bounds: latency, time between tokens, tokens of a request, tokens of a step, duration of a migration, pauses.
_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0)
_GAPS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
_TOKENS = tuple(float(m * 10**e) for e in range(6) for m in (1, 2, 5))
_BATCH = tuple(float(1 << k) for k in range(15))
_MIGRATIONS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_PAUSES = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.5)

_TURNS = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0)

# Label values.
FINISHED = ("stop", "length", "abort", "error", "deadline")
REJECTED = tuple(Rejection)
HANDLERS = (
    "chat",
    "completions",
    "responses",
    "messages",
    "models",
    "tokenize",
    "detokenize",
    "streams",
    "health",
    "info",
    "metrics",
    "unknown",
)
STATUSES = ("2xx", "4xx", "5xx", "disconnect")
DISPATCHES = tuple(DispatchKind)
MOVE_REASONS = tuple(MigrationReason)
MOVE_RESULTS = tuple(MigrationResult)
CLOSED = tuple(ConnectionEnd)

FRONTEND = Table(
    counters=(
        Counter("request_success", "Requests (choices) that have ended.", (("finished_reason", FINISHED),)),
        Counter("admission_rejections", "Requests rejected before they ran.", (("reason", REJECTED),)),
        Counter("prompt_tokens", "Prompt tokens of accepted requests."),
        Counter("generation_tokens", "Output tokens delivered."),
        Counter("cached_prompt_tokens", "Prompt tokens found in a prefix cache."),
        Counter("resumes", "Requests resumed on another engine after their engine was lost."),
        Counter("dispatches", "Requests dispatched to an engine, first or again.", (("kind", DISPATCHES),)),
        Counter("takeovers", "Requests continued on another engine after a migration."),
        Counter("stale_tokens", "Output tokens dropped: duplicates, or from a former owner."),
        Counter("http_requests", "HTTP requests answered.", (("handler", HANDLERS), ("status", STATUSES))),
        Counter("connections_accepted", "HTTP connections accepted."),
        Counter("connections_cut", "HTTP connections that the server closed, by reason.", (("reason", CLOSED),)),
        Counter("responses_adopted", "Responses that a successor of their frontend went on with."),
        Counter("responses_cut", "Responses that ended with their frontend."),
        Counter(
            "responses_unguarded", "Responses without a place in the outbox: they would end with their frontend."
        ),
        Counter("stream_reconnects", "Requests to go on with a kept stream."),
        Counter("malformed_requests", "Requests that are not valid HTTP."),
    ),
    histograms=(
        Histogram("time_to_first_token_seconds", "From arrival to the first output token.", _SECONDS),
        Histogram("inter_token_latency_seconds", "Between two output tokens of a request.", _GAPS),
        Histogram("request_time_per_output_token_seconds", "Mean gap between a request's tokens.", _GAPS),
        Histogram("e2e_request_latency_seconds", "From arrival to the end.", _SECONDS),
        Histogram("request_decode_time_seconds", "From the first output token to the last.", _SECONDS),
        Histogram("request_prompt_tokens", "Prompt tokens of a request.", _TOKENS),
        Histogram("request_generation_tokens", "Output tokens of a request.", _TOKENS),
        Histogram("request_params_max_tokens", "max_tokens of a request.", _TOKENS),
        Histogram("request_params_n", "n of an HTTP request.", (1.0, 2.0, 5.0, 10.0, 20.0)),
        Histogram("migration_pause_seconds", "Between the outputs before and after a takeover.", _PAUSES),
        Histogram("event_loop_cpu_seconds", "CPU time of the event loop between two ticks, 10 ms apart.", _TURNS),
        Histogram("event_loop_delay_seconds", "How late a tick of the event loop was.", _TURNS),
    ),
    gauges=(
        Gauge("connections", "HTTP connections that are open."),
        Gauge("max_connections", "Maximum number of open HTTP connections."),
        Gauge("streams_kept", "Streams that their clients have asked to keep, running or ended."),
        Gauge("request_body_bytes", "Bytes of request bodies in memory that count against body_memory."),
    ),
)

ENGINE = Table(
    counters=(
        Counter("prompt_tokens", "Prompt tokens computed, recomputation included."),
        Counter("generation_tokens", "Output tokens sampled."),
        Counter("preemptions", "Requests preempted: they lost their blocks and were queued again."),
        Counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache."),
        Counter("prefix_cache_hits", "Prompt tokens found in the prefix cache."),
        Counter("steps", "Steps that computed tokens."),
        Counter("migrated_bytes", "KV bytes copied to other engines."),
        Counter(
            "migrations",
            "Migrations from this engine that have ended, by reason and result.",
            (("reason", MOVE_REASONS), ("result", MOVE_RESULTS)),
        ),
    ),
    histograms=(
        Histogram("step_seconds", "Duration of a step that computed tokens.", _GAPS),
        Histogram("iteration_tokens", "Tokens computed in a step.", _BATCH),
        Histogram("request_queue_time_seconds", "From arrival to the first step.", _SECONDS),
        Histogram("request_prefill_time_seconds", "From the first step to the first output token.", _SECONDS),
        Histogram("migration_stages", "KV copies per migrated request.", tuple(float(n) for n in range(1, 9))),
        Histogram("migration_blocks", "KV blocks copied per migrated request.", _BATCH),
        Histogram("migration_seconds", "From the choice of a request to the end of its migration.", _MIGRATIONS),
        Histogram("migration_frozen_seconds", "Time that a migrated request spent in no batch here.", _PAUSES),
    ),
)
