"""Benefits of migration on a real daemon: de-fragmentation, priorities, drains; and the death of an engine.

    python -m bench.scenarios [--quick] [--only NAME] [--json FILE]

Starts its own daemons with two engines on the demo model. bench/README.md explains each number.
"""

from __future__ import annotations

import argparse
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench import death, defragmentation, drain, priority
from bench.parts import run_parts

Scenario = tuple[Callable[[bool], Awaitable[dict[str, Any]]], Callable[[dict[str, Any]], list[str]]]

SCENARIOS: dict[str, Scenario] = {
    "defragmentation": (lambda quick: defragmentation.measure(2 if quick else 6), defragmentation.lines),
    "priority": (lambda quick: priority.measure(1, 18.0) if quick else priority.measure(3, 36.0), priority.lines),
    "drain": (lambda quick: drain.measure(1 if quick else 3), drain.lines),
    "death": (lambda quick: death.measure(1 if quick else 5), death.lines),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds: about three minutes instead of ten")
    parser.add_argument("--only", choices=sorted(SCENARIOS), help="one scenario")
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    parts = {name: (partial(measure, args.quick), lines) for name, (measure, lines) in SCENARIOS.items()}
    run_parts("bench.scenarios", args, parts)


if __name__ == "__main__":
    main()
