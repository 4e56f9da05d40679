"""From facts to judgement: virtual usage and freeness (Llumnix, section 4.4). Pure.

Virtual usage of an instance, in blocks: what its running requests hold (a shared block once, an evictable
one as free), plus the demand of the request at the head of its queue; requests further back count zero.
Freeness = (capacity - virtual usage) / batch size: the decode steps an instance can go on for before its
memory is full. What was dispatched but has not been seen by the engine yet is added by the reader.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from daemon.control.messages import EngineFacts, EngineState


class InFlight(NamedTuple):
    """Submitted to an engine by any frontend and not yet taken off a ring."""

    requests: int = 0
    tokens: int = 0


NOTHING = InFlight()


def virtual_usage(facts: EngineFacts, in_flight: InFlight = NOTHING) -> float:
    """Blocks; infinite while draining. In-flight prompts count in full: they will be admitted together."""
    if facts.state == EngineState.DRAINING:
        return math.inf
    queued = facts.head_demand_blocks + in_flight.tokens / facts.block_size
    return facts.used_blocks + queued


def freeness(facts: EngineFacts, in_flight: InFlight = NOTHING) -> float:
    """Tokens per request still to come before memory is full; infinite when empty, -infinite when draining."""
    usage = virtual_usage(facts, in_flight)
    batch = facts.running + facts.waiting + in_flight.requests
    if batch == 0:
        return math.inf if usage < math.inf else -math.inf
    return (facts.total_blocks - usage) * facts.block_size / batch
