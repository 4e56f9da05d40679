"""A model that is served by its name on the hub, from the download to the answer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import Start
from tests.e2e.daemon_process import ROOT
from tests.models.hub.stand_in import hub_of_a_test
from tests.models.tiny_model import make_tiny_llama

NAME = "tiny-org/Tiny-1B"


def test_a_model_is_served_by_its_name(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llumd = [sys.executable, "-m", "daemon.cli.llumd"]
    with hub_of_a_test(tmp_path, monkeypatch) as hub:
        commit = hub.add(NAME, make_tiny_llama(tmp_path / "m")).branches["main"]
        check = subprocess.run([*llumd, "check", NAME], cwd=ROOT, capture_output=True, text=True, check=True)
        assert "not downloaded yet" in check.stderr
        assert not any(path.startswith("cdn:") for path in hub.paths())
        daemon = start("--devices", "cpu", model=NAME, engine="model", env=dict(os.environ))
        assert f"downloading {NAME} (commit {commit[:12]}" in daemon.log
        assert [model["id"] for model in daemon.get("/v1/models").json()["data"]] == [NAME]
        body = {"model": NAME, "messages": [{"role": "user", "content": "the quick"}], "max_tokens": 4}
        answer = httpx.post(f"{daemon.url}/v1/chat/completions", json=body, timeout=60).json()
        assert answer["usage"]["completion_tokens"] == 4
        remove = subprocess.run([*llumd, "rm", NAME], cwd=ROOT, capture_output=True, text=True, check=False)
        assert remove.returncode and remove.stderr == (
            f"llumd: a daemon serves {NAME} now; stop it before you remove the model\n"
        )
