"""What the banner and the messages tell the user to type."""

from __future__ import annotations

from pathlib import Path

import pytest

from daemon.cli.commands import command

ROOT = Path(__file__).parents[2]


def test_a_command_on_the_path_is_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script = tmp_path / "llumctl"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert command("llumctl") == "llumctl"


def test_a_checkout_has_launchers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(ROOT)
    assert command("llumctl") == "bin/llumctl"
    assert command("llumd") == "bin/llumd"
    monkeypatch.chdir(tmp_path)
    assert command("llumctl") == str(ROOT / "bin" / "llumctl")
