"""Run real client libraries against a daemon that runs: each in an environment of its own, with its newest release.

    python -m bench.clients.run URL [SCRIPT ...] [--cache DIR] [--model NAME] [--key KEY] [--out FILE]

A script names what it requires in its first line. Python's clients are installed with pip, those of JavaScript with
npm. The exit status is 1 if a check fails.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

SCRIPTS = Path(__file__).parent / "scripts"
_TIMEOUT = 900.0  # seconds for the checks of one client
_READY = 120.0  # seconds for the daemon to be ready
_REQUIRES = "requires:"


class Outcome(NamedTuple):
    """What one check of a client has shown. `why` says what went wrong."""

    client: str
    check: str
    ok: bool
    why: str


def scripts() -> list[Path]:
    """Return the scripts of all clients: files whose first line says what they require."""
    return sorted(file for file in SCRIPTS.iterdir() if file.is_file() and requirements(file))


def requirements(script: Path) -> list[str]:
    """Return the packages that a script requires."""
    first = script.read_text().partition("\n")[0]
    return first.partition(_REQUIRES)[2].split()


def install(script: Path, cache: Path) -> Path:
    """Install what a script requires, once, and return the directory that has it."""
    home, wanted = cache / script.name, " ".join(requirements(script))
    stamp = home / "installed"
    if stamp.is_file() and stamp.read_text() == wanted:
        return home
    home.mkdir(parents=True, exist_ok=True)
    if script.suffix == ".mjs":
        (home / "package.json").write_text('{"private": true}')
        commands = [["npm", "install", "--no-audit", "--no-fund", "--silent", *requirements(script)]]
    else:
        python = str(home / "bin" / "python")
        commands = [[sys.executable, "-m", "venv", str(home)]]
        commands += [[python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *requirements(script)]]
    for command in commands:
        subprocess.run(command, cwd=home, check=True, stdout=subprocess.DEVNULL)
    stamp.write_text(wanted)
    return home


def run_script(script: Path, home: Path, environ: dict[str, str]) -> list[Outcome]:
    """Run a script and return the outcomes of its checks; one that fails if it ends early."""
    match script.suffix:
        case ".mjs":
            for file in (script, SCRIPTS / "checks.mjs"):  # packages are found from where the file is
                (home / file.name).write_text(file.read_text())
            command = ["node", str(home / script.name)]
        case ".sh":
            command = ["bash", str(script)]
        case _:
            command = [str(home / "bin" / "python"), str(script)]
    try:
        done = subprocess.run(
            command, env=environ | {"VENV": str(home)}, capture_output=True, text=True, timeout=_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        return [Outcome(script.name, "(all)", False, f"not done in {_TIMEOUT:g} s")]
    rows: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    found = [Outcome(script.name, row["check"], row["ok"], row["why"]) for row in rows]
    if done.returncode:
        found.append(Outcome(script.name, "(exit)", False, done.stderr.strip()[-300:]))
    return found


def run(url: str, names: Sequence[str], cache: Path, *, model: str = "demo", key: str = "any") -> list[Outcome]:
    """Run the scripts whose names begin with one of `names`, all without names. Print each outcome."""
    environ = os.environ | {"LLUMD_URL": url.rstrip("/"), "LLUMD_MODEL": model, "LLUMD_KEY": key}
    found: list[Outcome] = []
    _await_ready(url)
    for script in scripts():
        if names and not script.name.startswith(tuple(names)):
            continue
        try:
            rows = run_script(script, install(script, cache), environ)
        except subprocess.CalledProcessError as e:
            rows = [Outcome(script.name, "(install)", False, str(e))]
        for row in rows:
            print(f"{'ok  ' if row.ok else 'FAIL'} {row.client:24} {row.check:24} {row.why}", flush=True)
        found += rows
    return found


def _await_ready(url: str) -> None:
    end = time.monotonic() + _READY
    while True:
        try:
            with urllib.request.urlopen(url.rstrip("/") + "/health/ready"):
                return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("scripts", nargs="*")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "llumd-clients")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--key", default="any")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = run(args.url, args.scripts, args.cache, model=args.model, key=args.key)
    print(f"{sum(row.ok for row in found)} of {len(found)} checks passed")
    if args.out:
        args.out.write_text(json.dumps([row._asdict() for row in found], indent=1))
    sys.exit(not all(row.ok for row in found))


if __name__ == "__main__":
    main()
