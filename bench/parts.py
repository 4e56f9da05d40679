"""A benchmark in parts that run one after the other in this process, each with a table of its own."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from bench.machine import describe

Part = tuple[Callable[[], Awaitable[dict[str, Any]]], Callable[[dict[str, Any]], list[str]]]
"""Measures, and turns what was measured into lines."""


def run_parts(command: str, args: argparse.Namespace, parts: Mapping[str, Part]) -> None:
    """Run `parts`, or only ``args.only``; print the tables, and write all figures to ``args.json`` if it is set."""
    figures: dict[str, Any] = {"command": f"python -m {command}", "quick": args.quick, "machine": describe()}
    for name in [args.only] if args.only else parts:
        measure, lines = parts[name]
        figures[name] = asyncio.run(_await(measure()))
        print("\n".join(lines(figures[name])), end="\n\n", flush=True)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


async def _await(measured: Awaitable[dict[str, Any]]) -> dict[str, Any]:
    return await measured
