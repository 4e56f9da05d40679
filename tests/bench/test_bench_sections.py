"""A section that fails, hangs or dies leaves its figures and the other sections alone."""

import json
import os
import sys
from contextlib import suppress
from dataclasses import asdict

import psutil
import pytest

from bench.sections import Figure, Outcome, append_figure, read_figures, run_all, run_section, table
from tests.e2e.daemon_process import is_alive, wait_for

pytestmark = pytest.mark.integration

FIGURE = Figure("copy", "a thing", 12.5, "ms", 10.0, True, {"share": 0.5})


@pytest.fixture
def run(tmp_path):
    """Run a script as a section; it has FIGURE as JSON in argv[1] and the file in argv[2]."""

    def go(script, budget=20.0):
        file = tmp_path / "figures"
        command = [sys.executable, "-c", script, json.dumps(asdict(FIGURE)), str(file)]
        return run_section("copy", command, budget, file, tmp_path / "output")

    return go


TELL = "import sys, os, time; open(sys.argv[2], 'a').write(sys.argv[1] + '\\n');"


def test_figures_come_back(run):
    outcome = run(TELL)
    assert (outcome.error, outcome.figures) == ("", [FIGURE])


def test_an_exception_is_recorded_with_what_came_before(run):
    outcome = run(TELL + "raise RuntimeError('the device is gone')")
    assert "the device is gone" in outcome.error
    assert outcome.figures == [FIGURE]


def test_death_is_recorded(run):
    assert "-9" in run(TELL + "os.kill(os.getpid(), 9)").error


def test_what_hangs_is_killed_with_its_children(run, tmp_path):
    child = "import subprocess; p = subprocess.Popen(['sleep', '600']);"
    child += "open(sys.argv[2] + '.pid', 'w').write(str(p.pid));"
    outcome = run(TELL + child + "time.sleep(600)", budget=6.0)
    assert "6 s" in outcome.error
    assert outcome.figures == [FIGURE]
    pid = int((tmp_path / "figures.pid").read_text())
    with suppress(psutil.NoSuchProcess):
        killed = psutil.Process(pid)
        wait_for("its child's end", lambda: not is_alive(killed))
    assert pid != os.getpid()


def test_a_line_cut_short_is_no_figure(tmp_path):
    file = tmp_path / "figures"
    append_figure(file, FIGURE)
    with file.open("a") as f:
        f.write('{"section": "co')
    assert read_figures(file) == [FIGURE]


def test_a_failure_stops_nobody_and_time_runs_out_for_all_alike():
    now, given, told = [0.0], {}, []

    def run(name, budget):
        given[name] = budget
        now[0] += 40.0
        return Outcome(name, 40.0, "broken" if name == "a" else "", [])

    outcomes = run_all("abcd", dict.fromkeys("abcd", 50.0), 100.0, run, told.append, clock=lambda: now[0])
    assert given == {"a": 50.0, "b": 50.0, "c": 20.0}
    assert [o.error for o in outcomes] == ["broken", "", "", "no time was left"]
    assert told == outcomes


def test_the_table_names_bars_and_failures():
    met = Figure("decode", "batch 1", 251.0, "tok/s", 240.0)
    text = table([Outcome("decode", 1.0, "", [met]), Outcome("copy", 1.0, "exit status 1:\n no memory", [FIGURE])])
    assert ">= 240 met" in text
    assert "<= 10 MISSED" in text
    assert "share 0.5" in text
    assert "FAILED: exit status 1: no memory" in text
