"""The commands `llumd models`, `llumd pull` and `llumd rm`: the models on this machine."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING

from daemon.cli.format import table
from daemon.cli.interrupts import EXIT_INTERRUPTED, interruptible
from daemon.cli.messages import print_progress, refuse
from daemon.models import store
from daemon.models.files import ModelError, gigabytes

if TYPE_CHECKING:
    from daemon.models.inventory import Entry

MODEL_HELP = "demo, a Hugging Face directory, a .gguf file, or a name on the hub: ORG/NAME[@REVISION][:FILE.gguf]"
_HEADINGS = ("NAME", "REVISION", "COMMIT", "SIZE", "LAST USED", "STATE")


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands to those of `llumd`."""
    models = commands.add_parser("models", help="list the models on this machine")
    models.add_argument("--json", action="store_true", help="print JSON, with paths")
    models.set_defaults(run=_models)
    pull = commands.add_parser("pull", help="download a model from the hub, or its newest revision")
    pull.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    pull.set_defaults(run=_pull)
    rm = commands.add_parser("rm", help="remove models from this machine, without a question")
    rm.add_argument("models", nargs="+", metavar="MODEL", help="a name or a path as `llumd models` shows it")
    rm.set_defaults(run=_remove)


def _models(args: argparse.Namespace) -> int:
    from daemon.models import inventory

    found = inventory.entries()
    if args.json:
        print(json.dumps([entry._asdict() for entry in found], indent=1))
        return 0
    if not found:
        print("no models on this machine; `llumd pull ORG/NAME` downloads one")
        return 0
    rows = [[e.name, e.revision, e.commit[:12], gigabytes(e.size), _day(e.last_used), _state(e)] for e in found]
    print("\n".join(table(_HEADINGS, rows)))
    return 0


def _state(entry: Entry) -> str:
    if entry.in_use:
        return "serving"
    if not entry.complete:
        return "incomplete"
    return "ready" if entry.kind == "hub" else entry.kind


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds)) if seconds else ""


def _pull(args: argparse.Namespace) -> int:
    try:
        with interruptible():
            path = store.pull(args.model, print_progress)
    except ModelError as e:
        return refuse(e)
    except KeyboardInterrupt:
        print("llumd: stopped; what was downloaded stays, and the next pull goes on from there", file=sys.stderr)
        return EXIT_INTERRUPTED
    print(f"{args.model} is in {path}")
    return 0


def _remove(args: argparse.Namespace) -> int:
    from daemon.models import inventory

    for model in args.models:
        try:
            freed = inventory.remove(model)
        except ModelError as e:
            return refuse(e)
        print(f"removed {model}: {gigabytes(freed)} are free again")
    return 0
