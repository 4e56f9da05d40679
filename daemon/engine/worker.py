"""The engine process: commands in, one step, tokens out, facts on the board; again."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple, NoReturn, cast

from daemon.config import Config
from daemon.control.policy.freeness import Policy, policy_of
from daemon.engine.build_runner import build_runner
from daemon.engine.calibrate import BUDGET, DEVICE_BUDGET, calibrate
from daemon.engine.consensus import Measure, agree
from daemon.engine.cost import StepCost
from daemon.engine.frontend_inbox import FrontendInbox
from daemon.engine.frontend_outbox import FrontendOutbox
from daemon.engine.journal_reader import JournalReader
from daemon.engine.migration.executor import MigrationExecutor
from daemon.engine.migration.llumlet import Llumlet
from daemon.engine.peer_inbox import PeerInbox
from daemon.engine.pipeline import Pipeline, Step
from daemon.engine.runner import DeviceRunner, PoolSpec, Runner, StepPlan
from daemon.engine.scheduler import Emission, Scheduler
from daemon.engine.standing import Standing
from daemon.engine.step_stats import StepStats
from daemon.engine.telemetry import Telemetry
from daemon.ipc import child, doorbell, metrics_page, segment
from daemon.ipc.child import EXIT_CONFIG, EXIT_FAILED, EXIT_PARKED, STOP_SIGNAL, ChildSpec
from daemon.ipc.event_ring import EventWriter
from daemon.ipc.fabric import Fabric
from daemon.ipc.journal import JournalView
from daemon.ipc.messages import EngineFacts, EngineIncarnation, EngineState, encode
from daemon.kvpool.block_manager import BlockManager
from daemon.kvpool.host_pools import HostPools, PeerPools
from daemon.kvpool.host_transport import HostTransport, Transport
from daemon.models.model_config import ModelError, read_model_config

log = logging.getLogger(__name__)

IDLE_BEAT = 0.25  # seconds between signs of life without work
MOVING_BEAT = 0.02  # the same while a request is on its way
IDLE_DEADLINE = 5.0
GRANT_WAIT = 0.003  # seconds that a step waits for the verdict on a request just handed over


def main(spec: ChildSpec) -> None:
    """Entry point of the engine process."""
    fabric = child.begin(spec)
    signal.signal(STOP_SIGNAL, lambda *_: sys.exit(0))
    progress = fabric.progress(fabric.process)
    progress.enter(EngineState.LOADING, fabric.incarnation, spec.config.load_timeout)
    try:
        _load_or_give_up(spec, fabric).run()
    except Exception as e:
        _fail(e)
    os._exit(EXIT_PARKED)  # all it owed is out, and what an interpreter tidies up at its end takes seconds with torch


def _load_or_give_up(spec: ChildSpec, fabric: Fabric) -> Worker:
    try:
        return _load(spec, fabric)
    except ModelError as e:
        log.error("%s", e)
        sys.exit(EXIT_CONFIG)


def _fail(error: Exception) -> NoReturn:
    """End for another to begin anew. At once: on a device that has failed, whatever tidies up may fail or hang."""
    log.critical("this engine ends, it will be started again: %s", error, exc_info=error)
    os._exit(EXIT_FAILED)


def _load(spec: ChildSpec, fabric: Fabric) -> Worker:
    config = spec.config
    started = time.monotonic()
    load_format = config.load_format if config.engine == "model" else "dummy"
    model_config = read_model_config(Path(spec.model_dir), config.served_name, load_format)
    _, index = fabric.topology.role(fabric.process)
    runner = build_runner(config, model_config, config.devices[index])
    if config.on_gpus:
        kv = _load_on_device(fabric, cast(DeviceRunner, runner))
    else:
        kv = _load_on_host(spec, fabric, runner)
    blocks = BlockManager(kv.num_blocks, config.block_size, prefix_caching=config.prefix_caching)
    cost = _measure(config, runner, kv.num_blocks)
    scheduler = Scheduler(
        blocks,
        max_num_seqs=config.max_num_seqs,
        max_batch_tokens=config.max_batch_tokens,
        max_model_len=runner.max_model_len,
        eos_token_ids=runner.eos_token_ids,
        max_mixed_tokens=cost.tokens_within(config.itl_target) if config.itl_target else 0,
    )
    log.info(
        "ready after %.1f s: %d KV blocks of %d tokens",
        time.monotonic() - started,
        kv.num_blocks - 1,
        config.block_size,
    )
    return Worker(
        fabric,
        runner,
        scheduler,
        kv,
        policy_of(config.policy, config.headroom),
        overlap=config.overlap,
        measure=Measure(cost.knee, config.ideal_tokens or cost.ideal_tokens),
    )


class _Kv(NamedTuple):
    """What became of the pool: its blocks, the dummy among them, those of the others, and the way there."""

    num_blocks: int
    peers: PeerPools
    transport: Transport
    handle: bytes = b""  # by which others open it, if they must be told


def _load_on_host(spec: ChildSpec, fabric: Fabric, runner: Runner) -> _Kv:
    """The model, and the pool that the supervisor has made."""
    pool = segment.attach(spec.pool)
    num_blocks = len(pool) // runner.pool_spec(1).block_bytes
    if num_blocks < 2:
        raise ModelError(f"kv_memory of {len(pool)} bytes holds no KV block of this model; give it more")
    runner.load(pool[: runner.pool_spec(num_blocks).nbytes])
    peers = HostPools(fabric.table(), fabric.topology, spec.supervisor_pid)
    return _Kv(num_blocks, peers, HostTransport(pool, fabric.bell))


def _load_on_device(fabric: Fabric, runner: DeviceRunner) -> _Kv:
    """The model, and a pool of the runner's own in the GPU's memory."""
    from daemon.kvpool.cuda_pools import for_runner

    runner.load()
    kv = for_runner(fabric, runner.pool_memory)
    return _Kv(runner.num_blocks, kv.peers, kv.mover, kv.handle)


def _measure(config: Config, runner: Runner, num_blocks: int) -> StepCost:
    """What steps cost here; all zero for the engines without a model, whose steps take what they are told to."""
    if config.engine != "model":
        return StepCost()
    cost = calibrate(
        runner,
        num_blocks=num_blocks,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_batch_tokens=config.max_batch_tokens,
        budget=DEVICE_BUDGET if config.on_gpus else BUDGET,
    )
    log.info(
        "a step takes %.3g ms, %.3g us a token and %.3g ns a token of KV: "
        "twice its ideal at %d tokens, near it up to %d of KV (0: no limit)",
        cost.base * 1e3,
        cost.per_token * 1e6,
        cost.per_kv * 1e9,
        cost.knee,
        cost.ideal_tokens,
    )
    return cost


class Worker:
    """The loop of one engine over its scheduler and runner."""

    def __init__(
        self,
        fabric: Fabric,
        runner: Runner,
        scheduler: Scheduler,
        kv: _Kv,
        policy: Policy,
        *,
        overlap: bool,
        measure: Measure,
    ) -> None:
        """`overlap`: plan the next step while one runs, if the runner can; `measure`: what was measured here."""
        topology = fabric.topology
        self._fabric = fabric
        self._runner = runner
        self._pipeline = Pipeline(runner, overlap=overlap)
        self._scheduler = scheduler
        self._progress = fabric.progress(fabric.process)
        self._board = fabric.board()
        self._metrics = metrics_page.MetricsPage(fabric.metrics(fabric.process), metrics_page.ENGINE)
        self._step_stats = StepStats(time.monotonic())
        self._steps = 0
        self._checked = True  # the books, since the last step
        self._counted = dict.fromkeys(("preemptions", "prefix_cache_queries", "prefix_cache_hits"), 0)
        self._outboxes = [FrontendOutbox(fabric.writer(topology.frontend(k))) for k in range(topology.frontends)]
        records = JournalReader([JournalView(fabric.journal(k)) for k in range(topology.frontends)])
        spec = runner.pool_spec(1)
        self._kv_format = _kv_format(spec)
        self._policy = policy
        self._make = f"{runner.device} {self._kv_format}"
        self._measured = self._agreed = measure
        self._agreed_at = -1  # second
        self._llumlet = Llumlet(scheduler, records, busier_than=self._busier_than)
        self._standing = Standing(fabric, self._llumlet)
        self._peers = kv.peers
        self._pool_handle = kv.handle
        self._telemetry = Telemetry(EventWriter(fabric.events(fabric.process)), self._metrics, spec.block_bytes)
        self._executor = MigrationExecutor(
            fabric, self._outboxes, kv.peers, kv.transport, spec.block_bytes, self._telemetry
        )
        self._peer_inbox = PeerInbox(fabric, self._llumlet, self._kv_format, self._executor.execute)
        self._inboxes = [
            FrontendInbox(
                k,
                fabric.incarnation,
                fabric.reader(topology.frontend(k)),
                records,
                self._llumlet,
                self._outboxes[k],
                self._executor.execute,
            )
            for k in range(topology.frontends)
        ]

    def run(self) -> None:
        """Serve until told to leave; returns once the engine is wished parked and nothing is left here."""
        while True:
            self._standing.apply()
            self._answer()
            plan = None if self._pipeline.closed else self._scheduler.plan(time.monotonic())
            if plan is not None:
                self._launch(plan)
            step = self._pipeline.collect(leave=0 if plan is None else 1)
            if step is not None:
                self._apply_result(step)
            self._publish()  # before the bells: who is woken finds the facts fresh
            self._deliver()
            if plan is None and step is None:
                if self._standing.state == EngineState.PARKED and self._vacant:
                    return
                self._rest()

    @property
    def _vacant(self) -> bool:
        """Whether nobody here is owed anything. What comes from now on its sender takes back."""
        scheduler, llumlet = self._scheduler, self._llumlet
        held = scheduler.running or scheduler.waiting or llumlet.incoming or llumlet.outgoing
        return not held and not any(outbox.owes for outbox in self._outboxes)

    def _answer(self) -> None:
        """Take what is there and answer it before the step: a request on its way stands still meanwhile.

        For the same reason the step waits a moment for the grant of what has just been handed over, which else
        would sit the whole step out. Once only, however long the frontend takes.
        """
        pending = len(self._llumlet.pending)
        self._listen()
        self._deliver()
        # With a step in flight the next one must be launched before that has ended.
        wait = min(GRANT_WAIT, self._step_stats.step_seconds / 3) if len(self._pipeline) else GRANT_WAIT
        end = time.monotonic() + wait
        while len(self._llumlet.pending) > pending and time.monotonic() < end:
            doorbell.wait(self._fabric.bell, wait)
            self._listen()
            self._deliver()

    def _listen(self) -> None:
        """Take what everybody has written, and what copies have ended."""
        self._peer_inbox.listen()
        self._peers.refresh()  # else the pool of a dead peer stays in memory
        for inbox in self._inboxes:
            inbox.drain()
        for move, arrived, nbytes in self._executor.ended():
            now = time.monotonic()
            self._metrics.inc("migrated_bytes", nbytes)
            self._executor.execute(
                self._llumlet.copied(move, now) if arrived else self._llumlet.copy_failed(move, now)
            )
        if not self._llumlet.idle:
            self._executor.execute(self._llumlet.tick(time.monotonic()))

    def _launch(self, plan: StepPlan) -> None:
        self._checked = False
        self._progress.beat(self._step_stats.step_deadline)
        self._pipeline.launch(plan)

    def _apply_result(self, step: Step) -> None:
        """Take in a step that has ended."""
        self._progress.beat(self._step_stats.step_deadline)
        now = time.monotonic()
        emissions = self._scheduler.apply_result(step.plan, step.result, now)
        for emission in emissions:
            self._outboxes[emission.request.frontend].emit(emission)
        self._executor.execute(self._llumlet.after_step(emissions, now, self._step_stats.step_seconds))
        self._telemetry.preempted(step.plan.preempted)
        self._account(step.plan, emissions, step.seconds, now)

    def _deliver(self) -> None:
        for k, outbox in enumerate(self._outboxes):
            if outbox.flush():
                self._fabric.ring_bell(self._fabric.topology.frontend(k))
        self._executor.flush()

    def _rest(self) -> None:
        """Nothing to compute: sleep until somebody rings or time is up, and check the books meanwhile."""
        self._step_stats.tick(time.monotonic())
        moving = not self._llumlet.idle
        if not doorbell.wait(self._fabric.bell, MOVING_BEAT if moving else IDLE_BEAT) and not self._checked:
            # Only once it has been quiet: a large pool takes milliseconds to check.
            self._scheduler.check(self._llumlet.tables())
            self._checked = True
        self._progress.beat(IDLE_DEADLINE)

    def _account(self, plan: StepPlan, emissions: list[Emission], seconds: float, now: float) -> None:
        tokens = sum(len(e.tokens) for e in emissions)
        self._steps += 1
        self._step_stats.step(seconds, tokens, now)
        self._metrics.inc("steps")
        self._metrics.observe("step_seconds", seconds)
        self._metrics.observe("iteration_tokens", plan.num_tokens)
        self._metrics.inc("generation_tokens", tokens)
        self._metrics.inc("prompt_tokens", sum(row.count for row in plan.rows[plan.num_decodes :]))
        self._account_prefills(emissions, now)
        self._account_scheduler()

    def _account_prefills(self, emissions: list[Emission], now: float) -> None:
        for emission in emissions:
            if emission.start == 0:
                request = emission.request
                self._metrics.observe("request_queue_time_seconds", request.admitted - request.params.arrival)
                self._metrics.observe("request_prefill_time_seconds", now - request.admitted)

    def _account_scheduler(self) -> None:
        """Carry the scheduler's own totals over to the statistics page."""
        totals = {
            "preemptions": self._scheduler.num_preemptions,
            "prefix_cache_queries": self._scheduler.prefix_query_tokens,
            "prefix_cache_hits": self._scheduler.prefix_hit_tokens,
        }
        for name, total in totals.items():
            if total != self._counted[name]:
                self._metrics.inc(name, total - self._counted[name])
                self._counted[name] = total

    def _publish(self) -> None:
        if self._agreed_at != self._step_stats.seconds:
            self._agreed_at = self._step_stats.seconds
            self._agreed = agree(self._measured, self._make, self._peer_inbox.alive())
        self._telemetry.state(self._standing.state)
        self._board.publish(encode(self._facts()))

    def _busier_than(self, peer: EngineIncarnation) -> bool:
        """Whether a move there still evens things out; it may be that we know nothing of it any more."""
        theirs = self._peer_inbox.facts_of(peer)
        return theirs is not None and self._policy.migration(self._facts()) < self._policy.migration(theirs)

    def _facts(self) -> EngineFacts:
        scheduler, blocks = self._scheduler, self._scheduler.blocks
        return EngineFacts(
            incarnation=self._fabric.incarnation,
            state=self._standing.state,
            step=self._steps,
            time=time.monotonic(),
            block_size=blocks.block_size,
            total_blocks=blocks.capacity,
            used_blocks=blocks.num_used,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            head_demand_blocks=scheduler.head_demand_blocks,
            pending_prefill_tokens=scheduler.pending_prefill_tokens,
            waiting_tokens=scheduler.waiting_tokens,
            max_num_seqs=scheduler.max_num_seqs,
            max_model_len=self._runner.max_model_len,
            step_seconds=self._step_stats.step_seconds,
            tokens_per_second=self._step_stats.tokens_per_second,
            consumed=[inbox.consumed for inbox in self._inboxes],
            high_running=sum(r.params.priority < 0 for r in scheduler.running.values()),
            high_waiting=sum(r.params.priority < 0 for r in scheduler.waiting),
            preempted_waiting=sum(r.preemptions > 0 for r in scheduler.waiting),
            incoming=len(self._llumlet.incoming),
            outgoing=len(self._llumlet.outgoing),
            kv_format=self._kv_format,
            pool_handle=self._pool_handle,
            knee=self._agreed.knee,
            ideal_tokens=self._agreed.ideal_tokens,
            measured_knee=self._measured.knee,
            measured_ideal_tokens=self._measured.ideal_tokens,
            make=self._make,
        )


def _kv_format(spec: PoolSpec) -> str:
    return f"{spec.dtype} {spec.layers}x2x{spec.block_size}x{spec.kv_heads}x{spec.head_dim}"
