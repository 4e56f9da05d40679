"""Starts an engine: loads the runner, the KV pool and the scheduler, and ends the process on failure."""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn, cast

from daemon.config import Config
from daemon.engine.build_runner import build_runner
from daemon.engine.calibrate import BUDGET, DEVICE_BUDGET, calibrate
from daemon.engine.cost import StepTime, fit_times
from daemon.engine.grammar.grammars import Grammars
from daemon.engine.identity import Identity, identify
from daemon.engine.runner import DeviceRunner, Runner, Unavailable
from daemon.engine.scheduler import Scheduler
from daemon.ipc import segment
from daemon.ipc.child import EXIT_CONFIG, EXIT_FAILED, ChildSpec
from daemon.ipc.fabric import Fabric
from daemon.ipc.model_text import CHANGED, text_digest
from daemon.kvpool import host_transport
from daemon.kvpool.block_manager import BlockManager
from daemon.kvpool.link import KvLink
from daemon.machine import cpus
from daemon.models.grammar.vocabulary import Vocabulary
from daemon.models.loader import open_model
from daemon.models.model_config import ModelConfig, ModelError
from daemon.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    from daemon.engine.fake.script import ScriptRunner

log = logging.getLogger(__name__)

_MASK_THREADS = 8


class LoadedEngine(NamedTuple):
    """An engine that is ready to run steps."""

    runner: Runner
    scheduler: Scheduler
    kv: KvLink
    identity: Identity
    grammars: Grammars  # of the requests that have one
    step_times: list[StepTime]  # measured on this engine
    ideal_tokens: int = 0  # set by the operator; 0: measured


def load_or_exit(spec: ChildSpec, fabric: Fabric) -> LoadedEngine:
    """Load the engine. Exit with EXIT_CONFIG if the model cannot run here: a restart would not help.

    Exit with EXIT_FAILED if something is missing that may be there later.
    """
    try:
        return load(spec, fabric)
    except ModelError as e:
        log.error("%s", e)
        sys.exit(EXIT_CONFIG)
    except Unavailable as e:
        log.error("%s; the supervisor tries again", e)
        os._exit(EXIT_FAILED)


def exit_failed(error: Exception) -> NoReturn:
    """End the process at once; the supervisor restarts it. No clean-up runs: after a device failure it may hang."""
    log.critical("this engine exits, the supervisor restarts it: %s", error, exc_info=error)
    os._exit(EXIT_FAILED)


def load(spec: ChildSpec, fabric: Fabric) -> LoadedEngine:
    """Load runner, pool and scheduler. Raises ModelError if the model cannot run here, Unavailable if not now."""
    config = spec.config
    started = time.monotonic()
    load_format = config.load_format if config.engine == "model" else "dummy"
    model_config = open_model(Path(spec.model_dir), config.main_name, load_format)
    if spec.model_text and spec.model_text != text_digest(spec.model_dir):
        raise ModelError(CHANGED.format(spec.model_dir))
    _, index = fabric.topology.role(fabric.process)
    grammars = _open_grammars(config, model_config, fabric)
    runner = build_runner(config, model_config, config.devices[index])
    weights = _WeightFiles(model_config) if load_format != "dummy" else None
    if config.on_gpus:
        kv = _load_on_device(fabric, cast(DeviceRunner, runner))
    else:
        kv = _load_on_host(spec, fabric, runner)
    digest = weights.digest() if weights is not None else _script_digest(config, runner)
    spec_of_pool, device = runner.pool_spec(1), config.devices[index]
    identity = identify(config, model_config, digest, spec_of_pool, device, runner.arithmetic)
    times = _measure(config, runner, kv.num_blocks)
    scheduler = Scheduler(
        BlockManager(
            kv.num_blocks,
            config.block_size,
            prefix_caching=config.prefix_caching,
            fingerprint=identity.fingerprint,
        ),
        max_num_seqs=config.max_num_seqs,
        max_batch_tokens=config.max_batch_tokens,
        max_model_len=runner.max_model_len,
        eos_token_ids=runner.eos_token_ids,
        max_mixed_tokens=fit_times(times).tokens_within(config.itl_target) if config.itl_target else 0,
    )
    log.info(
        "ready after %.1f s: %d KV blocks of %d tokens",
        time.monotonic() - started,
        kv.num_blocks - 1,
        config.block_size,
    )
    return LoadedEngine(runner, scheduler, kv, identity, grammars, times, config.ideal_tokens)


def _open_grammars(config: Config, model_config: ModelConfig, fabric: Fabric) -> Grammars:
    """Return the grammars of this engine. With a model, its vocabulary is built now, while the weights are read:
    later that would hold up steps."""

    def load_vocabulary() -> Vocabulary:
        tokenizer = Tokenizer(model_config.path)
        return Vocabulary(tokenizer, model_config.vocab_size, model_config.eos_token_ids)

    threads = max(2, min(_MASK_THREADS, cpus() // max(1, len(config.devices)) // 2))
    grammars = Grammars(load_vocabulary, threads=threads, wake=lambda: fabric.ring_bell(fabric.process))
    if config.engine == "model":
        grammars.warm_up()
    return grammars


def _script_digest(config: Config, runner: Runner) -> bytes:
    return cast("ScriptRunner", runner).script.digest if config.engine == "script" else b""


class _WeightFiles:
    """The weight files of a model. Create it before they are loaded."""

    def __init__(self, model_config: ModelConfig) -> None:
        from daemon.models import weights_digest  # imports numpy

        self._module = weights_digest
        self._path = model_config.path
        self._before = weights_digest.file_stamps(self._path)

    def digest(self) -> bytes:
        """Return the digest of what was loaded, once it is. Raises Unavailable if a file was replaced meanwhile."""
        digest = self._module.weights_digest(self._path)
        if self._module.file_stamps(self._path) != self._before:
            raise Unavailable(f"the weights in {self._path} were replaced while they were loaded")
        return digest


def _load_on_host(spec: ChildSpec, fabric: Fabric, runner: Runner) -> KvLink:
    """Load the model into the pool that the supervisor has created."""
    pool = segment.attach(spec.pool_fd)
    num_blocks = len(pool) // runner.pool_spec(1).block_bytes
    if num_blocks < 2:
        raise ModelError(f"kv_memory of {len(pool)} bytes holds no KV block of this model; give it more")
    runner.load(pool[: runner.pool_spec(num_blocks).nbytes])
    return host_transport.connect(fabric, pool, num_blocks, spec.supervisor_pid)


def _load_on_device(fabric: Fabric, runner: DeviceRunner) -> KvLink:
    """Load the model; the runner allocates the pool in the GPU's memory."""
    from daemon.kvpool import cuda_transport

    runner.load()
    return cuda_transport.connect(fabric, runner.pool_memory, runner.num_blocks)


def _measure(config: Config, runner: Runner, num_blocks: int) -> list[StepTime]:
    """Measure steps; none for the engines without a model: their step time is an option."""
    if config.engine != "model":
        return []
    times = calibrate(
        runner,
        num_blocks=num_blocks,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_batch_tokens=config.max_batch_tokens,
        budget=DEVICE_BUDGET if config.on_gpus else BUDGET,
        clock=time.perf_counter if config.on_gpus else time.thread_time,
    )
    cost = fit_times(times)
    log.info(
        "a step takes %.3g ms, %.3g us per token and %.3g ns per token of KV",
        cost.base * 1e3,
        cost.per_token * 1e6,
        cost.per_kv * 1e9,
    )
    return times
