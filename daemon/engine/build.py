"""Which runner an engine gets. Heavy imports happen here, inside the engine's process, and nowhere earlier."""

from __future__ import annotations

import os

from daemon.config import Config
from daemon.engine.runner import Runner
from daemon.models.card import ModelCard


def build_runner(config: Config, card: ModelCard) -> Runner:
    """The runner that `config.engine` asks for. Raises ModelError for a model that cannot run here."""
    length = min(config.max_model_len or card.max_position, card.max_position)
    if config.engine == "stub":
        from daemon.engine.runner_stub import StubRunner

        return StubRunner(
            step_seconds=config.stub_step,
            vocab_size=card.vocab_size,
            max_model_len=length,
            block_size=config.block_size,
        )
    if config.engine == "hash":
        from daemon.engine.runner_hash import HashRunner

        return HashRunner(card.vocab_size, length, config.block_size, step_seconds=config.stub_step)
    from daemon.engine.runner_cpu import CpuRunner

    return CpuRunner(
        card,
        threads=config.threads or max(1, cores() // max(1, len(config.devices))),
        dtype=config.dtype,
        deterministic=config.deterministic,
        load_format=config.load_format,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_batch_tokens=config.max_batch_tokens,
        max_model_len=length,
    )


def cores() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0))
