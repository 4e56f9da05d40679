"""The nemesis: its schedule, its verdicts, and a short run."""

from __future__ import annotations

import asyncio
import importlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

import pytest

from bench.answers import Answer, Broken, read_events
from bench.nemesis.clients import Attempt
from bench.nemesis.daemon import Daemon
from bench.nemesis.faults import Nemesis, Strike
from bench.nemesis.report import gaps
from bench.nemesis.requests import Template, lane_script, templates
from bench.nemesis.schedule import DEATHS_IN_A_ROW, REST, Fault, Kind, Shape, plan
from bench.nemesis.shared_memory import SharedMemory
from bench.nemesis.steps import ARMED, MIGRATION_STEPS, RESPONSE_STEPS, STEPS, SUCCESSION_STEPS
from bench.nemesis.verdicts import Verdict, judge

ROOT = Path(__file__).parents[2]
SHAPE = Shape(engines=3, frontends=2)


def test_the_seed_decides_faults_and_requests():
    assert plan(5, 300, SHAPE) == plan(5, 300, SHAPE)
    assert plan(5, 300, SHAPE) != plan(6, 300, SHAPE)
    assert templates(5, 20, longest=80) == templates(5, 20, longest=80)
    script, again = lane_script(5, 1, 20), lane_script(5, 1, 20)
    assert [next(script) for _ in range(50)] == [next(again) for _ in range(50)]


def test_a_long_schedule_has_faults_of_every_kind_at_every_step():
    faults = plan(1, 3000, SHAPE)
    assert {fault.kind for fault in faults} == set(Kind)
    assert {fault.step for fault in faults if fault.step} == set(STEPS)
    assert {fault.trigger for fault in faults} == {"", "moves", "death", "restart"}
    assert max(Counter(fault.kind for fault in faults).values()) < 1500


def deaths(fault: Fault, frontend: int) -> int:
    """Return how many deaths of the frontend the fault can cause, except by hanging."""
    aimed = f"frontend {frontend}" in fault.targets
    at_step = fault.kind is Kind.STEP_KILL and STEPS[fault.step].role == "frontend"
    hit = aimed and (fault.kind in (Kind.KILL, Kind.RESTART) or fault.trigger in ("death", "restart"))
    return hit + (at_step and (aimed or not fault.targets))


@pytest.mark.parametrize("frontend", [0, 1])
def test_each_frontend_rests_before_it_has_died_too_often(frontend):
    now, last, row = 0.0, 0.0, 0
    for fault in plan(3, 2000, SHAPE):
        now += fault.gap
        if count := deaths(fault, frontend):
            row = count if now - last >= REST else row + count
            last = now
        assert row <= DEATHS_IN_A_ROW


def test_every_step_names_a_function_of_the_daemon():
    assert len(STEPS) == len(MIGRATION_STEPS) + len(RESPONSE_STEPS) + len(SUCCESSION_STEPS)
    for step in STEPS.values():
        owner, name = step.function.split(".")
        assert callable(getattr(getattr(importlib.import_module(step.module), owner), name))


# -- verdicts ---------------------------------------------------------------------------------------

TEMPLATE = Template(0, "/v1/completions", {"stream": True, "max_tokens": 2})


def event(text: str, finish: str | None = None) -> bytes:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
    return b"data: " + json.dumps({"id": "a", "created": 1, "choices": [choice]}).encode() + b"\n\n"


WHOLE = event("one ") + event("two") + event("", "length") + b"data: [DONE]\n\n"


def attempt(body: bytes, status: int = 200, broken: str = "") -> Attempt:
    return Attempt("a", 0, status=status, body=bytearray(body), broken=broken)


@pytest.mark.parametrize(
    ("tried", "guarded", "verdict"),
    [
        (attempt(WHOLE), True, Verdict.EXACT),
        (attempt(event("one two") + event("", "length") + b"data: [DONE]\n\n"), True, Verdict.EXACT),
        (attempt(event("one ") + WHOLE), True, Verdict.CHANGED),
        (attempt(event("two") + event("one ") + WHOLE[-len(event("", "length")) - 14 :]), True, Verdict.CHANGED),
        (attempt(WHOLE + b"data: [DONE]\n\n"), True, Verdict.CUT),
        (attempt(WHOLE[:-14]), True, Verdict.CUT),
        (attempt(WHOLE[:50], broken="reset"), True, Verdict.CUT),
        (attempt(b"", 0, "reset"), True, Verdict.CUT),
        (attempt(b"", 0, "reset"), False, Verdict.UNANSWERED),
        (attempt(b'{"error": {"message": "full"}}', 429), False, Verdict.REFUSED),
        (attempt(b'{"error": {"message": "lost"}}', 500), False, Verdict.FAILED),
        (attempt(event("one ") + b'data: {"error": {"message": "lost"}}\n\n'), True, Verdict.FAILED),
    ],
)
def test_verdicts(tried, guarded, verdict):
    twin = read_events(200, WHOLE)
    found, detail = judge(TEMPLATE, tried, twin, guarded=guarded)
    assert found is verdict
    assert bool(detail) == (verdict.failed or verdict is Verdict.UNANSWERED)


def test_the_first_difference_is_shown_with_what_is_around():
    twin = Answer(200, texts={0: "a" * 100 + "b" + "c" * 100})
    other = Attempt("a", 0, status=200, answer=Answer(200, texts={0: "a" * 100 + "c" * 101}))
    _, detail = judge(TEMPLATE, other, twin, guarded=True)
    assert "first difference at 100" in detail
    assert "abcc" in detail


@pytest.mark.parametrize("body", [b"data: [DONE]", b"data: {}\n\ndata: [DONE]\n\n", b"event: x\n\ndata: [DONE]\n\n"])
def test_a_stream_must_be_well_formed(body):
    with pytest.raises(Broken):
        read_events(200, body)


def test_gaps_are_those_of_streams_whose_frontend_died():
    def strike(at: float, responses: dict[str, int]) -> Strike:
        fault = Fault(0, 0.0, Kind.KILL, ("frontend 1",))
        return Strike(fault, at, struck={"frontend 1": 9}, at=at, responses=responses, standby=True)

    attempts = [Attempt(name, 0, arrivals=[1.0, 2.0, 3.5, 9.0]) for name in "ab"]
    found = gaps([strike(2.1, {"a": 1, "b": 0, "c": 1}), strike(9.5, {"a": 1})], attempts)
    assert found == [(1.5, True, True)]


# -- runs -------------------------------------------------------------------------------------------


def test_a_run_ends_when_its_daemon_has_ended(tmp_path):
    (tmp_path / "steps").mkdir()
    (tmp_path / "steps" / ARMED).write_bytes(bytes(len(STEPS)))
    (tmp_path / "err").write_text("the last words\n")
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"], text=True)
    process.wait()
    daemon = Daemon(process, tmp_path, "demo", "http://127.0.0.1:9", Mock(spec=SharedMemory))
    with pytest.raises(SystemExit, match="exit code 3 after 0 faults:\nthe last words"):
        asyncio.run(Nemesis(daemon, 1).run(plan(1, 5, SHAPE)))


def run(tmp_path: Path, *arguments: str) -> dict:
    out = tmp_path / "result.json"
    command = [sys.executable, "-m", "bench.nemesis", "--json", str(out), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-12000:]
    return json.loads(out.read_text())


@pytest.mark.timeout(600)
@pytest.mark.e2e
def test_a_short_run_finds_nothing(tmp_path):
    found = run(tmp_path, "--seed", "7", "--faults", "40", "--lanes", "7", "--short")
    assert found["faults"] > 20
    assert found["leaks"] == []


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("engine", ["hash", "demo"])
def test_a_long_run_finds_nothing(tmp_path, engine):
    assert run(tmp_path, "--seed", "11", "--faults", "400", "--engine", engine)["faults"] > 250
