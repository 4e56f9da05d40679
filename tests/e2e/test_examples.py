"""Every block of docs/examples.md runs, and prints what it says."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import Start
from tests.e2e.daemon_process import Daemon

PAGE = Path(__file__).parents[2] / "docs" / "examples.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
COMMANDS = {
    "bash": ["bash", "-euc", "{}"],
    "python": [sys.executable, "-c", "{}"],
    "js": ["node", "--input-type=module", "-e", "{}"],
}


@pytest.fixture(scope="module")
def daemon(start_shared: Start) -> Daemon:
    return start_shared("--devices", "cpu", "--stub-step", "0.001", engine="hash")


@pytest.mark.parametrize(("language", "code"), BLOCKS, ids=[f"{k}-{i}" for i, (k, _) in enumerate(BLOCKS)])
def test_a_block_runs(daemon: Daemon, language: str, code: str):
    command = COMMANDS[language]
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    code = code.replace("http://127.0.0.1:8000", daemon.url).replace("curl -s", "curl --fail-with-body -s")
    command = [part.format(code) for part in command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"error"' not in done.stdout and done.stdout.strip(), done.stderr


def test_the_page_has_each_language():
    assert {language for language, _ in BLOCKS} == set(COMMANDS)
