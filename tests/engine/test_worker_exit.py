"""The exit of an engine process after a failure."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from daemon.ipc.child import EXIT_CONFIG, EXIT_FAILED

ROOT = Path(__file__).parents[2]
SCRIPT = """
import threading
from types import SimpleNamespace
from daemon.engine import startup, worker
from daemon.engine.runner import Unavailable
from daemon.models.model_config import ModelError

def fail(*args, **options):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def load(spec, fabric):
    threading.Thread(target=threading.Event().wait).start()  # a regular exit would wait for this thread for ever
    {load}

config = SimpleNamespace(load_timeout=1.0, policy="llumd", headroom=True, overlap=False)
fabric = SimpleNamespace(process=1, incarnation=1, progress=lambda p: SimpleNamespace(enter=lambda *a: None))
worker.child.initialize = lambda spec: fabric
startup.load = load
worker.Worker = lambda *args, **options: SimpleNamespace(run=fail)
worker.main(SimpleNamespace(config=config))
"""


def run(script: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("load", ["return None", "fail()"], ids=["while serving", "while loading"])
def test_a_failure_ends_the_process_at_once_with_its_reason(load: str):
    done = run(SCRIPT.format(load=load))
    assert done.returncode == EXIT_FAILED
    assert "the supervisor restarts it: CUDA error: an illegal memory access" in done.stderr
    assert "in fail" in done.stderr  # the traceback


def test_a_model_that_cannot_run_is_not_tried_again():
    script = SCRIPT.format(load="raise ModelError('no room for KV')").replace("threading.Event().wait", "int")
    done = run(script)
    assert (done.returncode, done.stderr.strip()) == (EXIT_CONFIG, "no room for KV")


def test_an_engine_that_lacks_memory_for_a_moment_is_started_again_and_says_so_in_one_line():
    done = run(SCRIPT.format(load="raise Unavailable('no room for KV at this time')"))
    assert (done.returncode, done.stderr.strip()) == (
        EXIT_FAILED,
        "no room for KV at this time; the supervisor tries again",
    )


def test_the_stop_signal_ends_the_process_though_a_thread_is_in_a_call_that_does_not_return():
    failure = 'raise RuntimeError("CUDA error: an illegal memory access was encountered")'
    script = SCRIPT.format(load="return None")
    assert failure in script
    stop = "os.kill(os.getpid(), signal.SIGUSR1); time.sleep(30)"
    done = run("import os, signal, time\n" + script.replace(failure, stop))
    assert (done.returncode, done.stderr) == (0, "")
