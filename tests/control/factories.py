"""Facts of engines and frontends, complete with defaults."""

from __future__ import annotations

from typing import Any

from daemon.ipc.messages import Demand, EngineFacts, EngineState, FrontendFacts


def engine_facts(**fields: Any) -> EngineFacts:
    """Return facts with `fields`; by default of an empty serving engine, incarnation 1, with 100 blocks of 16."""
    empty: dict[str, Any] = {
        "incarnation": 1, "state": EngineState.SERVING, "step": 0, "time": 0.0, "block_size": 16,
        "total_blocks": 100, "used_blocks": 0, "running": 0, "waiting": 0, "head_demand_blocks": 0,
        "pending_prefill_tokens": 0, "waiting_tokens": 0, "max_num_seqs": 64, "max_model_len": 4096,
        "step_seconds": 0.01, "tokens_per_second": 0.0, "consumed": [Demand(0, 0, 0)],
    }  # fmt: skip
    return EngineFacts(**(empty | fields))


def frontend_facts(*submitted: Demand, incarnation: int = 1) -> FrontendFacts:
    """Return the facts of a ready frontend that has sent `submitted` to each engine."""
    return FrontendFacts(incarnation, list(submitted), active=0, ready=True)
