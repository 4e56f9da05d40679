"""The result of a run: figures for JSON, and a table."""

from __future__ import annotations

import statistics
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from bench.nemesis.clients import Attempt
from bench.nemesis.faults import Strike
from bench.nemesis.lanes import Lane
from bench.nemesis.schedule import Kind
from bench.nemesis.verdicts import Verdict

LAST_FAULTS = 15  # that a failure shows


def faults_done(strikes: Iterable[Strike]) -> dict[str, int]:
    """Return how many faults were carried out, by kind and processes."""
    found: Counter[str] = Counter()
    for strike in strikes:
        if not strike.missed:
            found[_label(strike)] += 1
    return dict(sorted(found.items()))


def _label(strike: Strike) -> str:
    fault = strike.fault
    if fault.step:
        return f"{fault.kind}: {_STAGES[fault.trigger]}"
    if len(fault.targets) > 1:
        return f"{fault.kind} several at once"
    return f"{fault.kind} {''.join(c for c in ', '.join(fault.targets) if not c.isdigit()).strip()}".strip()


_STAGES = {
    "": "of a response",
    "moves": "of a migration",
    "death": "of a succession after a death",
    "restart": "of a planned hand-over",
}


def steps_done(strikes: Iterable[Strike]) -> dict[str, int]:
    """Return how often a process was struck at each named step."""
    return dict(sorted(Counter(s.fault.step for s in strikes if s.fault.step and not s.missed).items()))


def gaps(strikes: Sequence[Strike], attempts: Iterable[Attempt]) -> list[tuple[float, bool, bool]]:
    """Return (seconds, with a standby, alone) for each stream and death of its frontend.

    Seconds: from the last byte before the death to the first one after it. Alone: no other fault came in between.
    """
    by_name = {attempt.name: attempt for attempt in attempts if len(attempt.arrivals) > 1}
    times = sorted(strike.at or strike.begun for strike in strikes if not strike.missed)
    found = []
    for strike in strikes:
        victims = {int(name.split()[1]) for name in strike.struck if name.startswith("frontend ")}
        if strike.fault.kind is not Kind.KILL or not victims:
            continue
        for name, frontend in strike.responses.items():
            attempt = by_name.get(name)
            if frontend not in victims or attempt is None:
                continue
            i = bisect_right(attempt.arrivals, strike.at)
            if 0 < i < len(attempt.arrivals):
                end = attempt.arrivals[i]
                alone = bisect_right(times, end) - bisect_right(times, strike.at - 3.0) == 1
                found.append((end - attempt.arrivals[i - 1], strike.standby, alone))
    return found


def _gap_figures(found: list[float]) -> dict[str, Any]:
    if not found:
        return {"streams": 0}
    return {"streams": len(found), "median": round(statistics.median(found), 3), "worst": round(max(found), 3)}


def figures(lanes: Sequence[Lane], strikes: Sequence[Strike]) -> dict[str, Any]:
    """Return the counts and the gaps of a run."""
    clients: dict[str, dict[str, int]] = {}
    for lane in lanes:
        row = clients.setdefault(lane.kind, {str(verdict): 0 for verdict in Verdict})
        for verdict, count in lane.verdicts.items():
            row[str(verdict)] += count
    measured = gaps(strikes, (a for lane in lanes if lane.client.gaps for a in lane.attempts))
    return {
        "faults": sum(not strike.missed for strike in strikes),
        "missed": sum(bool(strike.missed) for strike in strikes),
        "by_kind": faults_done(strikes),
        "steps": steps_done(strikes),
        "requests": sum(len(lane.attempts) for lane in lanes),
        "clients": clients,
        "gap_seconds": {
            "all": _gap_figures([g for g, _, _ in measured]),
            "alone, with a standby": _gap_figures([g for g, standby, alone in measured if alone and standby]),
            "alone, without one": _gap_figures([g for g, standby, alone in measured if alone and not standby]),
        },
    }


def table(found: dict[str, Any]) -> str:
    """Return the figures of a run as text."""
    lines = [
        f"nemesis: seed {found['seed']}, engine {found['engine']}, {found['seconds']:.0f} s: "
        f"{found['faults']} faults ({found['missed']} more came to nothing), {found['requests']} requests",
        "",
        f"{'fault':<48}{'times':>6}",
    ]
    lines += [f"{name:<48}{count:>6}" for name, count in found["by_kind"].items()]
    lines += ["", "client      " + "".join(f"{verdict!s:>12}" for verdict in Verdict)]
    for name, row in found["clients"].items():
        lines.append(f"{name:<12}" + "".join(f"{row[str(verdict)]:>12}" for verdict in Verdict))
    lines.append("")
    for name, row in found["gap_seconds"].items():
        if row["streams"]:
            head = f"gap at a frontend's death ({name})"
            lines.append(
                f"{head}: {row['streams']} streams, median {row['median']:.2f} s, worst {row['worst']:.2f} s"
            )
    lines.append(f"metrics: {found['metrics']}; llumctl restart by exit code: {found['restarts']}")
    lines.append(f"leaks: {'; '.join(found['leaks']) or 'none'}")
    return "\n".join(lines)


def last_faults(strikes: Sequence[Strike], until: float) -> str:
    """Return the last faults before a time."""
    return "\n".join(str(strike) for strike in [s for s in strikes if s.begun <= until][-LAST_FAULTS:])
