"""Faults in a real daemon under load; every stream is compared with its unfaulted twin.

    python -m bench.nemesis --seed S --faults N [--engine hash|demo] [--out FILE]

The seed decides the faults and the requests. bench/README.md says what is counted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.machine import describe
from bench.nemesis.report import table
from bench.nemesis.run import ENGINES, Options, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", type=int, default=1000)
    parser.add_argument("--engine", choices=sorted(ENGINES), default="hash")
    parser.add_argument("--lanes", type=int, default=10, help="clients at once")
    parser.add_argument("--pace", type=float, default=0.4, help="mean seconds between two faults")
    parser.add_argument("--json", "--out", dest="json", type=Path, help="also write the results here")
    parser.add_argument("--short", action="store_true", help="no faults that take half a minute")
    parser.add_argument("--keep", action="store_true", help="keep the daemon's log in any case")
    parser.add_argument("--verbose", action="store_true", help="print every fault")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the daemon must not be left behind
    home = Path(tempfile.mkdtemp(prefix="nemesis-"))
    options = Options(args.seed, args.faults, args.engine, args.lanes, args.pace, args.short, args.verbose)
    found, failures = asyncio.run(_await(run(options, home)))
    print(table(found))
    for failure in failures:
        print(f"\n{failure}", file=sys.stderr)
    if args.json:
        machine = {"command": f"python -m bench.nemesis {' '.join(sys.argv[1:])}", "machine": describe()}
        args.json.write_text(json.dumps(machine | found, indent=1) + "\n")
    if failures or args.keep:
        print(f"seed {args.seed}: {len(failures)} failures; the daemon's log is {home / 'err'}", file=sys.stderr)
    else:
        shutil.rmtree(home)
    sys.exit(bool(failures))


async def _await(measured: Any) -> Any:
    return await measured


if __name__ == "__main__":
    main()
