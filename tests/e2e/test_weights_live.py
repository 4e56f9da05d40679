"""Weights are replaced one engine at a time: a request ends on those it began with, or with an error that says so."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from bench.answers import Answer
from daemon.cli import admin_client
from tests.e2e.conftest import Start
from tests.e2e.daemon_process import Daemon, wait_for
from tests.e2e.raw_client import Client
from tests.models.tiny_model import make_tiny_llama

pytestmark = pytest.mark.e2e
LONG = 3900  # tokens, more than an engine computes during the test


def make_model(directory: Path, seed: int) -> Path:
    return make_tiny_llama(directory, seed=seed, max_position=4096)


def replace_weights(model: Path, seed: int) -> None:
    """Rename other weights of the same shape over those of `model`, as a user must: engines have mapped the file."""
    file = make_model(model.with_name("other"), seed) / "model.safetensors"
    os.replace(file, model / file.name)


def stream(daemon: Daemon, tokens: int) -> Answer:
    url = urlsplit(daemon.url)
    assert url.hostname and url.port
    body: dict[str, Any] = {"prompt": [5, 6, 7], "max_tokens": tokens, "ignore_eos": True, "stream": True}
    with closing(Client((url.hostname, url.port))) as client:
        client.send("/v1/completions", body)
        return client.read()


def weights(daemon: Daemon) -> list[str]:
    return [row.get("weights", "") for row in daemon.status()["engines"]]


def test_weights_replaced_under_load(start: Start, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", seed=1)
    flags = ("--devices", "cpu,cpu", "--frontends", "1", "--threads", "1", "--max-model-len", "4096")
    daemon = start(*flags, model=str(model), engine="model")
    old = weights(daemon)[0]
    assert weights(daemon) == [old, old]
    assert f"weights {old[:8]}" in daemon.ctl("status").stdout.splitlines()[0]

    replace_weights(model, seed=2)
    done = daemon.ctl("restart", "engine", "0", timeout=120)
    assert done.returncode == 0, done.stderr
    new = weights(daemon)[0]
    assert weights(daemon) == [new, old] and new != old
    assert f"different weights: {new[:8]} on engine 0; {old[:8]} on engine 1" in daemon.ctl("status").stdout

    daemon.ctl("drain", "0")
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(stream, daemon, LONG)
        [row] = wait_for("output of engine 1", lambda: [r for r in daemon.requests() if r["output_tokens"]])
        daemon.ctl("undrain", "0")
        with pytest.raises(admin_client.Refused, match="a request ends on the weights it began with"):
            admin_client.call(daemon.run_dir / "admin.sock", "POST", f"/v1/requests/{row['id']}/migrate/0")
        before = daemon.kill("engine", 1)
        [error] = answer.result(timeout=120).errors
        assert "other weights now" in error["message"]
    daemon.await_successor("engine", 1, before)
    assert wait_for("one set of weights", lambda: weights(daemon) == [new, new])
    assert stream(daemon, 5).finishes[0] == ["length"]
    assert daemon.metric("llumd:responses_cut_total") == 0

    shutil.copy(model / "tokenizer.json", tmp_path / "kept")
    (model / "tokenizer.json").write_text("{}")
    done = daemon.ctl("restart", "all")
    assert done.returncode and "the tokenizer" in done.stderr and "restart the whole daemon" in done.stderr
    assert all(row["state"] == "serving" for row in daemon.status()["engines"])
