"""What the scripts of clients share: a table of checks, each with its outcome on one line. Standard library only."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

URL = os.environ.get("LLUMD_URL", "http://127.0.0.1:8000")
BASE = URL + "/v1"
MODEL = os.environ.get("LLUMD_MODEL", "demo")
KEY = os.environ.get("LLUMD_KEY", "any")

_checks: list[Callable[[], Any]] = []


def check(function: Callable[[], Any]) -> Callable[[], Any]:
    """Register a check: a function, also an async one, that raises if the client does not work as it should."""
    _checks.append(function)
    return function


def main() -> None:
    """Run all checks of a script and print a JSON object for each."""
    only = sys.argv[1:]
    for function in _checks:
        if only and function.__name__ not in only:
            continue
        outcome = {"check": function.__name__, "ok": True, "why": ""}
        try:
            result = function()
            if inspect.isawaitable(result):
                asyncio.run(_await(result))
        except Exception as e:
            why = f"{type(e).__name__}: {e}".replace("\n", " ")
            outcome |= {"ok": False, "why": why[:300]}
            if os.environ.get("LLUMD_TRACE"):
                traceback.print_exc()
        print(json.dumps(outcome), flush=True)


async def _await(result: Any) -> None:
    await result
