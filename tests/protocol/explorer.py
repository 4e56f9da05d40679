"""Visits every state that a `World` can reach, and asks of each: does everything hold, and can it still end?"""

from __future__ import annotations

import gc
import pickle
from collections import deque
from typing import NamedTuple

from daemon.kvpool.block_manager import PoolError
from tests.protocol.world import PROGRESS, Action, Violation, World


class Outcome(NamedTuple):
    """`flaw`: what does not hold, None if all does; `path`: the actions that lead there; `said`: which messages
    were ever read."""

    states: int
    edges: int
    flaw: str | None
    path: list[Action]
    complete: bool  # every reachable state was visited
    said: set[str]


def explore(start: World, limit: int = 1_000_000) -> Outcome:
    """Breadth first, so that a flaw is shown by a shortest path. Stops at the first flaw, or at `limit` states.

    That a request can always end is asked by going backwards from the ends, over what the world does by itself;
    only of a complete visit.
    """
    gc.collect()
    gc.disable()  # nothing here forms cycles that matter, and looking for them takes a third of the time
    try:
        return _explore(start, limit)
    finally:
        gc.enable()


def _explore(start: World, limit: int) -> Outcome:
    start.check()
    numbers = {start.key(): 0}
    origins: list[tuple[int, Action]] = [(-1, ())]
    before: list[list[int]] = [[]]  # by which states each is reached without a fault
    ends = []
    queue = deque([start.save()])
    said: set[str] = set()
    visited = edges = 0
    while queue:
        blob = queue.popleft()
        here, visited = visited, visited + 1
        world: World = pickle.loads(blob)
        if world.finished():
            ends.append(here)
        for action in list(world.actions()):
            world = pickle.loads(blob)
            edges += 1
            try:
                world.apply(action)
            except (Violation, PoolError, ValueError, IndexError, KeyError, AssertionError) as e:
                return Outcome(visited, edges, f"{type(e).__name__}: {e}", _path(origins, here, action), False, said)
            said.add(world.said)
            key = world.key()
            there = numbers.get(key)
            if there is None:
                there = numbers[key] = len(numbers)
                origins.append((here, action))
                before.append([])
                queue.append(world.save())
            if action[0] in PROGRESS:
                before[there].append(here)
        if len(numbers) > limit:
            return Outcome(visited, edges, None, [], False, said)
    if stuck := _stuck(before, ends):
        path = _path(origins, *origins[stuck[0]])
        return Outcome(visited, edges, f"stuck: {len(stuck)} states cannot end", path, True, said)
    return Outcome(visited, edges, None, [], True, said)


def _stuck(before: list[list[int]], ends: list[int]) -> list[int]:
    """States from which no end can be reached."""
    good = set(ends)
    work = list(ends)
    while work:
        for state in before[work.pop()]:
            if state not in good:
                good.add(state)
                work.append(state)
    return [state for state in range(len(before)) if state not in good]


def _path(origins: list[tuple[int, Action]], state: int, last: Action) -> list[Action]:
    path = [last]
    while state > 0:
        state, action = origins[state]
        path.append(action)
    return path[::-1]
