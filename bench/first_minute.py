"""The first minutes on a GPU: is the CUDA engine right there, and how fast is it? One command, one result.

    python -m bench.first_minute --out DIR [--limit SECONDS] [--only facts,tests,kernels]

Sections run in the order of what they tell: facts of the machine, `tests/gpu` (a file each, the basic ones first; a
file that fails runs again without early launches), single kernels, then the sections of `bench.gpu`. Every result is
stored at once in `first_minute.json`, so a run that is cut short keeps what it found.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from bench import gpu, machine
from bench.sections import Figure, Outcome, run_section, table

ROOT = Path(__file__).resolve().parent.parent
FIRST = ("device", "decode", "prefill", "profile", "kernels", "moves", "copies")
BENCHES = (*FIRST, *(name for name in gpu.SECTIONS if name not in FIRST))
_COMMANDS = (
    (
        "nvidia-smi",
        "--query-gpu=name,driver_version,compute_cap,mig.mode.current,memory.total,clocks.max.sm",
        "--format=csv",
    ),
    ("nvidia-smi", "topo", "-m"),
    ("nvcc", "--version"),
)
_TEST_BUDGET = 90.0  # seconds for a file of tests/gpu
_MOST_TIME_FOR_TESTS = 0.5  # share of the limit


def facts() -> dict[str, str]:
    """Return what the driver and the compiler tell about themselves, by command."""
    return {" ".join(command): _output(command) for command in _COMMANDS}


def _output(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(
            command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        return f"not run: {e}"
    return done.stdout.strip()


def test_file(file: Path, out: Path, budget: float, *, early_launch: bool = True) -> Outcome:
    """Run one file of tests/gpu, and return how many of its tests passed and failed."""
    name = file.stem.removeprefix("test_gpu_") + ("" if early_launch else ", no early launch")
    log = out / f"test_{file.stem}{'' if early_launch else '_late'}.log"
    command = [sys.executable, "-m", "pytest", str(file), "-q", "-rfEs", "--tb=short", "--timeout=60"]
    xml = log.with_suffix(".xml")
    command += ["-p", "no:cacheprovider", "--durations=3", f"--junit-xml={xml}"]
    environment = () if early_launch else ("env", "LLUMD_EARLY_LAUNCH=off")
    outcome = run_section("tests", [*environment, *command], budget, out / "tests.figures", log)
    error = outcome.error and (_failures(log.read_text(errors="replace")) or outcome.error)
    return Outcome("tests", outcome.seconds, error, [_counts(name, xml)])


def _counts(name: str, xml: Path) -> Figure:
    """Return how many tests passed, failed and were skipped. A run that was cut short has no report."""
    if not xml.exists():
        return Figure("tests", name, 0.0, "passed", more={"report": "none"})
    suites = list(ElementTree.parse(xml).getroot().iter("testsuite"))
    counts = {kind: sum(int(s.get(kind, 0)) for s in suites) for kind in ("tests", "failures", "errors", "skipped")}
    failed = counts["failures"] + counts["errors"]
    passed = counts["tests"] - failed - counts["skipped"]
    return Figure("tests", name, float(passed), "passed", more={"failed": failed, "skipped": counts["skipped"]})


def _failures(output: str) -> str:
    return "\n".join(line for line in output.splitlines() if line.startswith(("FAILED", "ERROR")))


def tests(out: Path, deadline: float, report: Callable[[Outcome], None]) -> None:
    """Run tests/gpu file by file, in the order in which files build on each other, until `deadline`."""
    from tests.gpu.conftest import ORDER

    (out / "tests.figures").write_text("")
    for name in ORDER:
        file = ROOT / "tests" / "gpu" / name
        left = deadline - time.monotonic()
        if left < 5:
            report(Outcome("tests", 0.0, f"{name}: no time was left", []))
            continue
        outcome = test_file(file, out, min(_TEST_BUDGET, left))
        report(outcome)
        if outcome.error and deadline - time.monotonic() > 30:
            report(test_file(file, out, min(_TEST_BUDGET, deadline - time.monotonic()), early_launch=False))


def benches(names: Sequence[str], out: Path, deadline: float, dry: str, report: Callable[[Outcome], None]) -> None:
    """Run sections of `bench.gpu` until `deadline`."""
    for name in names:
        left = min(gpu.SECTIONS[name].budget, deadline - time.monotonic())
        if left < 5:
            report(Outcome(name, 0.0, "no time was left", []))
            continue
        figures = out / f"{name}.figures"
        figures.unlink(missing_ok=True)
        command = [sys.executable, "-m", "bench.gpu", "--section", name, "--out", str(out)]
        command += ["--dry-run", dry] if dry else []
        report(run_section(name, command, left, figures, out / f"{name}.log"))


class Report:
    """Results so far: printed, and stored after each section."""

    def __init__(self, out: Path, found: dict[str, Any]) -> None:
        self._out = out
        self._found = found
        self.outcomes: list[Outcome] = []

    def add(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        result = self._found | {"sections": [asdict(one) for one in self.outcomes]}
        (self._out / "first_minute.json").write_text(json.dumps(result, indent=1) + "\n")
        print(table([outcome]).partition("\n")[2], flush=True)
        print(f"  {outcome.section}: {outcome.seconds:.0f} s", flush=True)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.first_minute", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("first-minute"), help="folder for results and logs")
    parser.add_argument("--limit", type=float, default=530.0, help="seconds for everything together")
    known = ("tests", *BENCHES)
    parser.add_argument("--only", default="", help=f"some of {','.join(known)}")
    parser.add_argument("--dry-run", nargs="?", const="cuda:0", default="", metavar="DEVICE", help="a tiny model")
    args = parser.parse_args(argv)
    args.names = args.only.split(",") if args.only else list(known)
    if unknown := set(args.names) - set(known):
        parser.error(f"--only: no section {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. The exit status is 1 if a test or a section failed."""
    args = _arguments(argv)
    end = time.monotonic() + args.limit
    out = args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)
    found = machine.environment(gpu.PACKAGES)
    found |= {"commands": facts(), "limit": args.limit, "dry_run": bool(args.dry_run)}
    print(json.dumps(found["commands"], indent=1), flush=True)
    report = Report(out, found)
    if "tests" in args.names:
        alone = args.names == ["tests"]
        tests(out, end if alone else time.monotonic() + args.limit * _MOST_TIME_FOR_TESTS, report.add)
    benches([name for name in args.names if name != "tests"], out, end, args.dry_run, report.add)
    print("\n" + table(report.outcomes))
    return int(any(outcome.error for outcome in report.outcomes))


if __name__ == "__main__":
    sys.exit(main())
