"""How an engine process ends when what computes has failed."""

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
from daemon.engine import worker
from daemon.models.model_config import ModelError

def serve():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def load(birth, fabric):
    threading.Thread(target=threading.Event().wait).start()  # what tidies up would wait for this for ever
    {load}

fabric = SimpleNamespace(process=1, incarnation=1, progress=lambda p: SimpleNamespace(enter=lambda *a: None))
worker.child.begin = lambda birth: fabric
worker._load = load
worker.main(SimpleNamespace(config=SimpleNamespace(load_timeout=1.0)))
"""


def run(script: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("load", ["return SimpleNamespace(run=serve)", "serve()"])
def test_a_failure_ends_the_process_at_once_and_says_why(load: str):
    done = run(SCRIPT.format(load=load))
    assert done.returncode == EXIT_FAILED
    assert "it will be started again: CUDA error: an illegal memory access" in done.stderr
    assert "in serve" in done.stderr  # where


def test_a_model_that_cannot_run_is_not_tried_again():
    script = SCRIPT.format(load="raise ModelError('no room for KV')").replace("threading.Event().wait", "int")
    done = run(script)
    assert (done.returncode, done.stderr.strip()) == (EXIT_CONFIG, "no room for KV")
