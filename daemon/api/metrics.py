"""/metrics: the metrics of all processes as one Prometheus page.

vLLM's metric names have totals over all engines, exactly one series each: a gateway that reads only the first series
of a name must not mistake one engine for the whole daemon. Single engines have series under names of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

from daemon.ipc.messages import EngineFacts, EngineState
from daemon.ipc.metrics_page import Counter, Histogram, HistogramValue, MetricsPage, Snapshot
from daemon.ipc.process_table import ENGINE_STATES

# Metrics that vLLM has too keep its names; the others have the prefix `llumd:`.
_VLLM_FRONTEND = frozenset(
    {
        *("request_success", "admission_rejections", "prompt_tokens", "generation_tokens"),
        *("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"),
        *("request_time_per_output_token_seconds", "request_decode_time_seconds", "request_prompt_tokens"),
        *("request_generation_tokens", "request_params_max_tokens", "request_params_n"),
    }
)
_VLLM_ENGINE = {
    "preemptions": "vllm:num_preemptions",
    "prefix_cache_queries": "vllm:prefix_cache_queries",
    "prefix_cache_hits": "vllm:prefix_cache_hits",
    "iteration_tokens": "vllm:iteration_tokens_total",
    "request_queue_time_seconds": "vllm:request_queue_time_seconds",
    "request_prefill_time_seconds": "vllm:request_prefill_time_seconds",
}


@dataclass(frozen=True, slots=True)
class DaemonSnapshot:
    """Metrics, facts and states of all processes at one moment.

    `facts[i]` is None while engine i has published nothing; `states[i]` is one of `process_table.ENGINE_STATES`.
    """

    frontends: Sequence[Snapshot]
    engines: Sequence[Snapshot]
    facts: Sequence[EngineFacts | None]
    states: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class FrontendMetrics:
    """The metrics page that this frontend writes, and a function that reads those of all processes."""

    page: MetricsPage
    read_all: Callable[[], DaemonSnapshot]


def render(
    model_name: str,
    frontend_pages: Sequence[Snapshot],
    engine_pages: Sequence[Snapshot],
    engine_facts: Sequence[EngineFacts | None],
    engine_states: Sequence[str] = (),
) -> bytes:
    """Return the page in Prometheus text format.

    Index i of `engine_pages`, `engine_facts` and `engine_states` is engine i.
    """
    registry = CollectorRegistry(auto_describe=False)
    snapshot = DaemonSnapshot(frontend_pages, engine_pages, engine_facts, engine_states)
    registry.register(_Collector(model_name, snapshot))
    return generate_latest(registry)


class _Collector:
    def __init__(self, model_name: str, snapshot: DaemonSnapshot) -> None:
        self._model_name = model_name
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        yield from self._gauges()
        yield from self._totals(self._snapshot.frontends, _frontend_name)
        yield from self._totals(self._snapshot.engines, _VLLM_ENGINE.get)
        yield from self._frontend_gauges()
        yield from self._engine_gauges()
        yield from self._engine_counters()

    # -- totals, labelled with the model only

    def _gauges(self) -> Iterator[Metric]:
        facts = [f for f in self._snapshot.facts if f is not None]
        used, total = sum(f.used_blocks for f in facts), sum(f.total_blocks for f in facts)
        usage = used / total if total else 0.0
        yield self._gauge("vllm:num_requests_running", "Requests in a batch.", sum(f.running for f in facts))
        yield self._gauge("vllm:num_requests_waiting", "Requests queued.", sum(f.waiting for f in facts))
        yield self._gauge("vllm:kv_cache_usage_perc", "KV blocks in use; 1 means all.", usage)
        labels = ["model_name", "block_size", "num_gpu_blocks"]
        info = GaugeMetricFamily("vllm:cache_config_info", "KV cache, all engines together.", labels=labels)
        info.add_metric([self._model_name, str(max((f.block_size for f in facts), default=0)), str(total)], 1)
        yield info

    def _gauge(self, name: str, help: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, help, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family

    def _totals(self, pages: Sequence[Snapshot], name_of: Callable[[str], str | None]) -> Iterator[Metric]:
        if not pages:
            return
        table = pages[0].table
        for counter in table.counters:
            if name := name_of(counter.name):
                yield self._total_counter(name, counter, pages)
        for histogram in table.histograms:
            if name := name_of(histogram.name):
                family = HistogramMetricFamily(name, histogram.help, labels=["model_name"])
                _add_buckets(family, [self._model_name], histogram, _merged(histogram, pages))
                yield family

    def _total_counter(self, name: str, counter: Counter, pages: Sequence[Snapshot]) -> Metric:
        labels = ["model_name", *(label for label, _ in counter.labels)]
        family = CounterMetricFamily(name, counter.help, labels=labels)
        for values in counter.series():
            family.add_metric([self._model_name, *values], sum(p.counter(counter.name, *values) for p in pages))
        return family

    # -- one series for each frontend

    def _frontend_gauges(self) -> Iterator[Metric]:
        pages = self._snapshot.frontends
        for gauge in pages[0].table.gauges if pages else ():
            family = GaugeMetricFamily(f"llumd:frontend_{gauge.name}", gauge.help, labels=["frontend"])
            for k, page in enumerate(pages):
                family.add_metric([str(k)], page.gauge(gauge.name))
            yield family

    # -- one series for each engine

    def _engine_gauges(self) -> Iterator[Metric]:
        gauges: tuple[tuple[str, str, Callable[[EngineFacts], float]], ...] = (
            ("requests_running", "Requests in the batch.", lambda f: f.running),
            ("requests_waiting", "Requests queued.", lambda f: f.waiting),
            ("kv_blocks", "KV blocks the engine has.", lambda f: f.total_blocks),
            ("kv_blocks_used", "KV blocks held by a request.", lambda f: f.used_blocks),
            ("pending_prefill_tokens", "Prompt tokens still to compute.", lambda f: f.pending_prefill_tokens),
            ("tokens_per_second", "Output tokens a second, moving average.", lambda f: f.tokens_per_second),
        )
        serving = GaugeMetricFamily("llumd:engine_serving", "1 while the engine serves.", labels=["engine"])
        for i, facts in enumerate(self._snapshot.facts):
            serving.add_metric([str(i)], float(facts is not None and facts.state == EngineState.SERVING))
        yield serving
        states = GaugeMetricFamily("llumd:engine_state", "1 for the engine's state.", labels=["engine", "state"])
        for i, current in enumerate(self._snapshot.states):
            for state in ENGINE_STATES:
                states.add_metric([str(i), state], float(state == current))
        yield states
        for name, help, value in gauges:
            family = GaugeMetricFamily(f"llumd:engine_{name}", help, labels=["engine"])
            for i, facts in enumerate(self._snapshot.facts):
                if facts is not None:
                    family.add_metric([str(i)], value(facts))
            yield family

    def _engine_counters(self) -> Iterator[Metric]:
        pages = self._snapshot.engines
        if not pages:
            return
        for counter in pages[0].table.counters:
            labels = ["engine", *(label for label, _ in counter.labels)]
            family = CounterMetricFamily(f"llumd:engine_{counter.name}", counter.help, labels=labels)
            for i, page in enumerate(pages):
                for values in counter.series():
                    family.add_metric([str(i), *values], page.counter(counter.name, *values))
            yield family
        for histogram in pages[0].table.histograms:
            distribution = HistogramMetricFamily(f"llumd:engine_{histogram.name}", histogram.help, labels=["engine"])
            for i, page in enumerate(pages):
                _add_buckets(distribution, [str(i)], histogram, page.histogram(histogram.name))
            yield distribution


def _frontend_name(name: str) -> str:
    return f"vllm:{name}" if name in _VLLM_FRONTEND else f"llumd:{name}"


def _merged(histogram: Histogram, pages: Sequence[Snapshot]) -> HistogramValue:
    values = [p.histogram(histogram.name) for p in pages]
    counts = [sum(column) for column in zip(*(v.counts for v in values), strict=True)]
    return HistogramValue(counts, sum(v.sum for v in values))


def _add_buckets(
    family: HistogramMetricFamily, labels: list[str], histogram: Histogram, value: HistogramValue
) -> None:
    bounds = [*(floatToGoString(b) for b in histogram.buckets), "+Inf"]
    family.add_metric(labels, list(zip(bounds, accumulate(value.counts), strict=True)), value.sum)
