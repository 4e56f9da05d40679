"""Compares ways to compute the same thing on one device. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

Way = TypeVar("Way")


def least_seconds(runs: Mapping[Way, Callable[[], float]], rounds: int) -> dict[Way, float]:
    """Return the least seconds of `rounds` runs of each way. `runs`: runs a way and returns its seconds.

    The ways take turns, so that a temporary slowdown of the device affects all of them.
    """
    times = [{way: run() for way, run in runs.items()} for _ in range(rounds)]
    return {way: min(seconds[way] for seconds in times) for way in runs}
