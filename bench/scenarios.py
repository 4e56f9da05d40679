"""Benefits of migration on a real daemon: de-fragmentation, priorities, drains; and the death of an engine.

    python -m bench.scenarios [--quick] [--only NAME] [--json FILE]

Starts its own daemons with two engines on the demo model. bench/README.md explains each number.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from bench import death, defragmentation, drain, priority
from bench.machine import describe

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
    figures: dict[str, Any] = {"command": "python -m bench.scenarios", "quick": args.quick, "machine": describe()}
    for name in [args.only] if args.only else SCENARIOS:
        measure, lines = SCENARIOS[name]
        figures[name] = asyncio.run(_await(measure(args.quick)))
        print("\n".join(lines(figures[name])), end="\n\n", flush=True)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


async def _await(measured: Awaitable[dict[str, Any]]) -> dict[str, Any]:
    return await measured


if __name__ == "__main__":
    main()
