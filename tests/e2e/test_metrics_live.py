"""/metrics and /health of a running daemon, as a scraper and a load balancer read them."""

from __future__ import annotations

from collections import Counter

import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from tests.e2e.conftest import Start
from tests.e2e.daemon_process import Daemon, wait_for
from tests.e2e.load_client import Clients

ONE_SERIES = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
LONG = {"prompt": "x", "max_tokens": 4000, "stream": True}


@pytest.fixture(scope="module")
def daemon(start_shared: Start) -> Daemon:
    return start_shared("--frontends", "2", "--stub-step", "5ms")


def samples(daemon: Daemon) -> list[Sample]:
    answer = daemon.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return [sample for family in text_string_to_metric_families(answer.text) for sample in family.samples]


def test_page_parses_and_totals_have_one_series(daemon: Daemon) -> None:
    found = samples(daemon)
    count = Counter(sample.name for sample in found)
    assert [count[name] for name in ONE_SERIES] == [1, 1, 1]
    assert count["llumd:engine_serving"] == 2
    identities = [(sample.name, tuple(sorted(sample.labels.items()))) for sample in found]
    assert len(set(identities)) == len(identities)


def test_gauges_follow_the_load(daemon: Daemon) -> None:
    with Clients(daemon, [LONG] * 6) as clients:
        clients.await_tokens(1)
        assert daemon.metric("vllm:num_requests_running") == 6
        assert daemon.metric("llumd:engine_requests_running") == 6
        assert 0 < daemon.metric("vllm:kv_cache_usage_perc") < 1
    daemon.await_idle()
    assert daemon.metric("vllm:num_requests_running") == 0
    assert daemon.metric("vllm:kv_cache_usage_perc") == 0


def test_counters_count_every_request_and_survive_a_frontend_restart(daemon: Daemon) -> None:
    names = ("vllm:generation_tokens_total", "vllm:prompt_tokens_total", "vllm:time_to_first_token_seconds_count")
    before = [daemon.metric(name) for name in names]
    for _ in range(10):
        assert daemon.complete([5] * 7, max_tokens=3).status_code == 200
    expected = [before[0] + 30, before[1] + 70, before[2] + 10]
    assert [daemon.metric(name) for name in names] == expected
    for k in (0, 1):
        killed = daemon.kill("frontend", k)
        daemon.await_successor("frontend", k, killed)
    assert [daemon.metric(name) for name in names] == expected
    daemon.await_serving()
    assert daemon.complete([5] * 7, max_tokens=3).status_code == 200
    assert [daemon.metric(name) for name in names] == [expected[0] + 3, expected[1] + 7, expected[2] + 1]


def test_refused_requests_are_counted(daemon: Daemon) -> None:
    before = daemon.metric("llumd:http_requests_total")
    assert daemon.complete(max_tokens=-1).status_code == 400
    assert daemon.metric("llumd:http_requests_total") >= before + 1


def test_not_ready_while_no_engine_serves(start: Start) -> None:
    daemon = start("--devices", "cpu")
    assert daemon.get("/health/ready").status_code == 200
    before = daemon.kill("engine")
    answer = wait_for("not ready", lambda: a if (a := daemon.get("/health/ready")).status_code == 503 else None)
    assert answer.headers["retry-after"]
    assert daemon.get("/health").status_code == 200
    refused = daemon.complete(max_tokens=1)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_engine")
    daemon.await_successor("engine", 0, before)
    wait_for("ready again", lambda: daemon.get("/health/ready").status_code == 200)
    assert daemon.complete(max_tokens=1).status_code == 200
