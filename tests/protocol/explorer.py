"""Visits every state that a `World` can reach, and checks each: do all invariants hold, and can all requests end?"""

from __future__ import annotations

import gc
import pickle
from collections import deque
from typing import NamedTuple

from daemon.kvpool.block_manager import PoolError
from tests.protocol.engine_model import Violation
from tests.protocol.invariants import is_finished
from tests.protocol.state_key import state_key
from tests.protocol.world import PROGRESS, Action, World

COLLECT_EVERY = 20_000  # states; the worlds that are made meanwhile take 1 GB


class Outcome(NamedTuple):
    """The result of an exploration."""

    states: int
    edges: int
    flaw: str | None  # the invariant that does not hold; None if all hold
    path: list[Action]  # the actions that lead to the flaw
    complete: bool  # True if every reachable state was visited
    messages_read: set[str]  # the types of all messages that were read


def explore(start: World, limit: int = 1_000_000) -> Outcome:
    """Explore breadth first, so that the path to a flaw is a shortest one.

    Stop at the first flaw or at `limit` states.

    Whether every request can end is checked backwards from the final states, over the actions in PROGRESS, and only
    if the exploration is complete.
    """
    gc.collect()
    gc.freeze()
    gc.disable()  # worlds are cycles; to collect them as often as Python does takes a third of the time
    try:
        return _explore(start, limit)
    finally:
        gc.enable()
        gc.unfreeze()


def _explore(start: World, limit: int) -> Outcome:
    start.check()
    # Of a key only its hash is kept, to save memory. Of 4e7 explorations of a million states, one takes two states
    # for the same.
    numbers = {hash(state_key(start)): 0}
    origins: list[tuple[int, Action]] = [(-1, ())]
    predecessors: list[list[int]] = [[]]  # of each state, by actions in PROGRESS
    final_states = []
    queue = deque([start.save()])
    messages_read: set[str] = set()
    visited = edges = 0
    while queue:
        blob = queue.popleft()
        here, visited = visited, visited + 1
        if not visited % COLLECT_EVERY:
            gc.collect()
        world: World = pickle.loads(blob)
        if is_finished(world):
            final_states.append(here)
        for i, action in enumerate(list(world.actions())):
            if i:  # the first action changes the world that is loaded already
                world = pickle.loads(blob)
            edges += 1
            try:
                world.apply(action)
            except (Violation, PoolError, ValueError, IndexError, KeyError, AssertionError) as e:
                path = _path(origins, here, action)
                return Outcome(visited, edges, f"{type(e).__name__}: {e}", path, False, messages_read)
            messages_read.add(world.message_read)
            key = hash(state_key(world))
            there = numbers.get(key)
            if there is None:
                there = numbers[key] = len(numbers)
                origins.append((here, action))
                predecessors.append([])
                queue.append(world.save())
            if action[0] in PROGRESS:
                predecessors[there].append(here)
        if len(numbers) > limit:
            return Outcome(visited, edges, None, [], False, messages_read)
    if stuck := _stuck(predecessors, final_states):
        path = _path(origins, *origins[stuck[0]])
        return Outcome(visited, edges, f"stuck: {len(stuck)} states cannot end", path, True, messages_read)
    return Outcome(visited, edges, None, [], True, messages_read)


def _stuck(predecessors: list[list[int]], final_states: list[int]) -> list[int]:
    """Return the states from which no final state can be reached."""
    can_end = set(final_states)
    work = list(final_states)
    while work:
        for state in predecessors[work.pop()]:
            if state not in can_end:
                can_end.add(state)
                work.append(state)
    return [state for state in range(len(predecessors)) if state not in can_end]


def _path(origins: list[tuple[int, Action]], state: int, last: Action) -> list[Action]:
    path = [last]
    while state > 0:
        state, action = origins[state]
        path.append(action)
    return path[::-1]
