"""This revision beside another one, on the simulated GPU: the same benchmark over the `daemon` package of each."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("torch", "flashinfer-python", "numpy")


@contextmanager
def combined(checkout: Path) -> Iterator[Path]:
    """Make a directory with the `daemon` of `checkout` and the benchmarks of this revision."""
    if not (checkout / "daemon").is_dir():
        raise SystemExit(f"{checkout} is not the root of a checkout: it has no daemon/")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "daemon").symlink_to(checkout.absolute() / "daemon")
        (root / "bench").symlink_to(ROOT / "bench")
        yield root


def run_for_json(root: Path, command: str, arguments: Sequence[str] = ()) -> dict[str, Any]:
    """Run `python COMMAND --json FILE` in `root`, and return what it wrote. Ends the program if it fails.

    The simulation is that of this revision and starts with this revision's `daemon`: -P keeps its first Python from
    looking into `root`. The Python that it starts looks there first.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        words = [sys.executable, "-P", *shlex.split(command), *arguments, "--json", str(file)]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(words, cwd=root, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{shlex.join(words)}, in {root}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        found: dict[str, Any] = json.loads(file.read_text())
        return found


def name_of(checkout: Path) -> str:
    """Return the commit of a checkout, with "+" if files were changed; "" if git does not know."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def versions() -> dict[str, str]:
    """Return the versions of the packages that compute."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = ""
    return found
