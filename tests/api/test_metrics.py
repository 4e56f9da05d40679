"""The Prometheus page: series, labels and totals."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from daemon.api.metrics import render
from daemon.ipc.messages import EngineFacts, EngineState
from daemon.ipc.metrics_page import ENGINE, FRONTEND, MetricsPage, Table, snapshot


def _page(table: Table, fill):
    memory = memoryview(bytearray(table.nbytes))
    fill(MetricsPage(memory, table))
    return snapshot(memory, table)


def _facts(**changes: object) -> EngineFacts:
    facts = dict.fromkeys(EngineFacts.__struct_fields__, 0) | {"state": EngineState.SERVING, "consumed": []}
    return EngineFacts(**(facts | changes))


def _series(text: bytes) -> dict[str, list[tuple[dict[str, str], float]]]:
    out: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            out.setdefault(sample.name, []).append((sample.labels, sample.value))
    return out


def test_each_vllm_gauge_has_one_series_for_the_whole_daemon():
    facts = [
        _facts(running=3, waiting=1, used_blocks=10, total_blocks=40, block_size=16),
        None,  # still loading
        _facts(running=4, waiting=5, used_blocks=30, total_blocks=40, block_size=16),
    ]
    series = _series(render("m", [], [], facts))
    labels = {"model_name": "m"}
    assert series["vllm:num_requests_running"] == [(labels, 7)]
    assert series["vllm:num_requests_waiting"] == [(labels, 6)]
    assert series["vllm:kv_cache_usage_perc"] == [(labels, 0.5)]
    info = labels | {"block_size": "16", "num_gpu_blocks": "80"}
    assert series["vllm:cache_config_info"] == [(info, 1)]
    assert series["llumd:engine_serving"] == [({"engine": e}, v) for e, v in (("0", 1), ("1", 0), ("2", 1))]
    assert series["llumd:engine_requests_running"] == [({"engine": "0"}, 3), ({"engine": "2"}, 4)]


def test_each_engine_is_in_exactly_one_state():
    states = ["serving", "parked", "parking"]
    series = _series(render("m", [], [], [_facts(), None, _facts(state=EngineState.PARKED)], states))
    current = {label["engine"]: label["state"] for label, value in series["llumd:engine_state"] if value}
    assert current == dict(zip("012", states, strict=True))
    assert sum(value for _, value in series["llumd:engine_state"]) == 3
    assert [value for _, value in series["llumd:engine_serving"]] == [1, 0, 0]


def test_totals_are_sums_over_processes():
    def frontend(page: MetricsPage) -> None:
        page.inc("generation_tokens", 5)
        page.inc("request_success", 1, "stop")
        page.observe("time_to_first_token_seconds", 0.3)
        page.observe("time_to_first_token_seconds", 1e9)

    def engine(page: MetricsPage) -> None:
        page.inc("preemptions", 2)
        page.observe("iteration_tokens", 100)

    series = _series(render("m", [_page(FRONTEND, frontend)] * 2, [_page(ENGINE, engine)] * 3, [None] * 3))
    labels = {"model_name": "m"}
    assert series["vllm:generation_tokens_total"] == [(labels, 10)]
    assert (labels | {"finished_reason": "stop"}, 2) in series["vllm:request_success_total"]
    assert series["vllm:num_preemptions_total"] == [(labels, 6)]
    assert series["llumd:engine_preemptions_total"] == [({"engine": str(i)}, 2) for i in range(3)]
    buckets = dict((float(label["le"]), v) for label, v in series["vllm:time_to_first_token_seconds_bucket"])
    assert (buckets[0.25], buckets[0.5], buckets[float("inf")]) == (0, 2, 4)
    assert series["vllm:time_to_first_token_seconds_count"] == [(labels, 4)]
    assert series["vllm:iteration_tokens_total_sum"] == [(labels, 300)]


def test_no_metric_name_is_exposed_twice():
    empty = [_page(FRONTEND, lambda page: None)], [_page(ENGINE, lambda page: None)] * 2
    text = render('quo"te\\', *empty, [_facts(), _facts()])
    names = [line.split()[2] for line in text.decode().splitlines() if line.startswith("# TYPE")]
    assert len(names) == len(set(names)) > 30
    for name, found in _series(text).items():
        labels = [tuple(sorted(label.items())) for label, _ in found]
        assert len(labels) == len(set(labels)), name
