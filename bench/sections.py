"""A benchmark in sections.

Each section is a process, so that it cannot disturb the others or leave its GPU in a bad state.

A section reports its figures one by one, and each is stored at once. So the figures of a section that fails or runs
out of time are kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

OUTPUT_TAIL = 600  # characters of the output of a failed section that are stored


@dataclass(frozen=True, slots=True)
class Figure:
    """A measured value. `bar`: its target, a minimum or, with `at_most`, a maximum."""

    section: str
    what: str
    value: float
    unit: str
    bar: float | None = None
    at_most: bool = False
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        if self.bar is None:
            return ""
        good = self.value <= self.bar if self.at_most else self.value >= self.bar
        return f"{'<=' if self.at_most else '>='} {_number(self.bar)} {'met' if good else 'MISSED'}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of a section. `error` is empty if it succeeded."""

    section: str
    seconds: float
    error: str
    figures: list[Figure]


def run_section(name: str, command: Sequence[str], budget: float, figures: Path, output: Path) -> Outcome:
    """Run `command`, which appends its figures to the file `figures`, for at most `budget` seconds.

    At the end kill its whole process group.
    """
    figures.touch()
    began, error = time.monotonic(), ""
    with output.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
        )
        try:
            status = process.wait(budget)
            if status:
                error = f"exit status {status}: {output.read_text(errors='replace')[-OUTPUT_TAIL:].strip()}"
        except subprocess.TimeoutExpired:
            error = f"not done within its {budget:.0f} s"
        finally:
            _end(process)
    return Outcome(name, time.monotonic() - began, error, read_figures(figures))


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_all(
    names: Iterable[str],
    budgets: dict[str, float],
    limit: float,
    run: Callable[[str, float], Outcome],
    report: Callable[[Outcome], None],
    clock: Callable[[], float] = time.monotonic,
) -> list[Outcome]:
    """Run each section in turn, within its budget and the rest of `limit` seconds for all sections."""
    end, outcomes = clock() + limit, []
    for name in names:
        left = min(budgets[name], end - clock())
        outcome = run(name, left) if left > 0 else Outcome(name, 0.0, "no time was left", [])
        outcomes.append(outcome)
        report(outcome)
    return outcomes


def append_figure(file: Path, figure: Figure) -> None:
    with file.open("a") as f:
        f.write(json.dumps(asdict(figure)) + "\n")


def read_figures(file: Path) -> list[Figure]:
    """Read the figures that were written completely."""
    lines = file.read_text().split("\n")[:-1]
    return [Figure(**json.loads(line)) for line in lines]


def table(outcomes: Iterable[Outcome]) -> str:
    """Return a table with a line for each figure and for each section that failed."""
    lines = [f"{'section':<13}{'what':<42}{'value':>12} {'unit':<8} {'bar':<18} more"]
    for outcome in outcomes:
        lines += [_line(figure) for figure in outcome.figures]
        if outcome.error:
            lines.append(f"{outcome.section:<13}FAILED: {' '.join(outcome.error.split())[-300:]}")
    return "\n".join(lines)


def _line(figure: Figure) -> str:
    more = ", ".join(
        f"{name} {_number(v) if isinstance(v, float) else v}"
        for name, v in figure.more.items()
        if not isinstance(v, dict | list)
    )
    return (
        f"{figure.section:<13}{figure.what:<42}{_number(figure.value):>12} {figure.unit:<8} "
        f"{figure.verdict:<18} {more}"
    ).rstrip()


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
