"""The engine process: read messages, run one step, send its output, publish facts; repeat."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time

from daemon.control.policy.freeness import Policy, policy_of
from daemon.engine import startup
from daemon.engine.cost import SharedCost, fit_times
from daemon.engine.frontend_inbox import FrontendInbox
from daemon.engine.frontend_outbox import FrontendOutbox
from daemon.engine.journal_reader import JournalReader
from daemon.engine.migration.actions import Action
from daemon.engine.migration.executor import MigrationExecutor
from daemon.engine.migration.llumlet import Llumlet
from daemon.engine.peer_inbox import PeerInbox
from daemon.engine.pipeline import Pipeline, Step
from daemon.engine.runner import PoolSpec, StepPlan
from daemon.engine.scheduler import Emission
from daemon.engine.startup import LoadedEngine
from daemon.engine.step_stats import StepStats
from daemon.engine.telemetry import Telemetry
from daemon.ipc import child, doorbell, metrics_page
from daemon.ipc.child import EXIT_PARKED, STOP_SIGNAL, ChildSpec
from daemon.ipc.desired_state import DesiredStateReader
from daemon.ipc.event_ring import EventWriter
from daemon.ipc.fabric import Fabric
from daemon.ipc.journal import JournalView
from daemon.ipc.messages import EngineFacts, EngineIncarnation, EngineState, Reserve, encode

log = logging.getLogger(__name__)

IDLE_BEAT = 0.25  # seconds between signs of life without work
MOVING_BEAT = 0.02  # the same while a move is in progress
IDLE_DEADLINE = 5.0  # seconds until the next sign of life is due, without work
STATE_DEADLINE = 5.0  # the same after a change of state
GRANT_WAIT = 0.003  # seconds that a step waits for the Grant of a request that was just handed over


def main(spec: ChildSpec) -> None:
    """Run the engine process."""
    fabric = child.initialize(spec)
    signal.signal(STOP_SIGNAL, lambda *_: sys.exit(0))
    progress = fabric.progress(fabric.process)
    progress.enter(EngineState.LOADING, fabric.incarnation, spec.config.load_timeout)
    try:
        config, engine = spec.config, startup.load_or_exit(spec, fabric)
        # A regular exit waits for threads in a call of the driver.
        signal.signal(STOP_SIGNAL, lambda *_: os._exit(0))
        Worker(fabric, engine, policy_of(config.policy, config.headroom), overlap=config.overlap).run()
    except Exception as e:
        startup.exit_failed(e)
    os._exit(EXIT_PARKED)  # all output is sent, and a regular exit takes seconds with torch


class Worker:
    """The loop of one engine over its scheduler and runner.

    `state` is SERVING, DRAINING or PARKED; LOADING until the desired state was first applied.
    """

    def __init__(self, fabric: Fabric, engine: LoadedEngine, policy: Policy, *, overlap: bool) -> None:
        """`overlap`: plan the next step while one runs, if the runner can."""
        topology = fabric.topology
        _, self._index = topology.role(fabric.process)
        self.state = EngineState.LOADING
        self._fabric = fabric
        self._policy = policy
        self._runner = engine.runner
        self._scheduler = engine.scheduler
        self._pipeline = Pipeline(
            engine.runner, overlap=overlap, beat=lambda: self._progress.beat(self._step_deadline)
        )
        self._desired_states = DesiredStateReader(fabric.desired_states())
        self._progress = fabric.progress(fabric.process)
        self._board = fabric.board()
        self._metrics = metrics_page.MetricsPage(fabric.metrics(fabric.process), metrics_page.ENGINE)
        self._step_stats = StepStats(time.monotonic())
        self._own_cost = fit_times(engine.step_times)
        self._step_deadline = self._step_stats.deadline()
        self._num_steps = 0
        self._checked = True  # `Scheduler.check` has run since the last step
        self._counted = dict.fromkeys(("preemptions", "prefix_cache_queries", "prefix_cache_hits"), 0)
        pool_spec = engine.runner.pool_spec(1)
        self._identity = engine.identity
        self._cost_group = f"{engine.runner.device} {_kv_format(pool_spec)}"
        self._cost = SharedCost(self._cost_group, engine.step_times, engine.ideal_tokens)
        self._cost_interval = -1  # of the step statistics, in which `_cost` was updated
        self._pools = engine.kv.pools
        self._pool_handle = engine.kv.handle
        self._telemetry = Telemetry(EventWriter(fabric.events(fabric.process)), self._metrics, pool_spec.block_bytes)
        frontends = {k: topology.frontend(k) for k in range(topology.frontends)}
        self._grammars = engine.grammars
        watch = engine.grammars.watch
        self._journals = journals = JournalReader([JournalView(fabric.journal(k)) for k in frontends], watch)
        self.llumlet = Llumlet(
            engine.scheduler,
            journals,
            is_busier_than=self._is_busier_than,
            copy_refusal=self._copy_refusal,
            has_same_weights=self._has_same_weights,
        )
        self._outboxes = [FrontendOutbox(fabric.writer(process)) for process in frontends.values()]
        self._executor = MigrationExecutor(
            fabric, self._outboxes, engine.kv.pools, engine.kv.transport, pool_spec.block_bytes, self._telemetry
        )
        self._peer_inbox = PeerInbox(fabric, self.llumlet, self._prepare)
        self._frontend_inboxes = [
            FrontendInbox(k, fabric.incarnation, fabric.reader(process), journals, self.llumlet)
            for k, process in frontends.items()
        ]

    def run(self) -> None:
        """Serve until STOP_SIGNAL; return once the desired state is PARKED and nothing is left."""
        while True:
            self.apply_desired_state()
            self._handle_messages()
            plan = None if self._pipeline.closed else self._scheduler.plan(time.monotonic())
            if plan is not None:
                self._launch(plan)
            step = self._pipeline.collect(leave=0 if plan is None else 1)
            if step is not None:
                self._apply_result(step)
            self._publish()  # before the bells: a process that is woken finds the facts up to date
            self._flush()
            if plan is None and step is None:
                if self.state == EngineState.PARKED and self._is_empty():
                    return
                self._wait_for_work()

    def apply_desired_state(self) -> None:
        """Apply the state that the coordinator desires; one load if it has not changed."""
        desired = self._desired_states.of(self._index)
        if desired == self.state:
            return
        self.state = desired
        self.llumlet.accept(desired == EngineState.SERVING)
        self._progress.enter(desired, self._fabric.incarnation, STATE_DEADLINE)

    def _is_empty(self) -> bool:
        """Return True if no request and no unsent output is left. Senders take back what they send from now on."""
        scheduler, llumlet = self._scheduler, self.llumlet
        holds_requests = scheduler.running or scheduler.waiting or llumlet.incoming or llumlet.outgoing
        return not holds_requests and not any(outbox.pending for outbox in self._outboxes)

    def _execute(self, actions: list[Action]) -> None:
        """Execute the llumlet's actions. Every effect of a message passes here."""
        self._executor.execute(actions)

    def _handle_messages(self) -> None:
        """Read all messages and answer them before the step: a request that is moving stands still meanwhile.

        For the same reason the step waits briefly for the Grant of a request that was just handed over: without it
        the request would wait for the whole step. It waits only once, however long the frontend takes.
        """
        pending = len(self.llumlet.pending)
        self._read_messages()
        self._flush()
        # With a step in flight the next step must be launched before that one ends.
        wait = min(GRANT_WAIT, self._step_stats.step_seconds / 3) if len(self._pipeline) else GRANT_WAIT
        end = time.monotonic() + wait
        while len(self.llumlet.pending) > pending and time.monotonic() < end:
            doorbell.wait(self._fabric.bell, wait)
            self._read_messages()
            self._flush()

    def _read_messages(self) -> None:
        """Read all rings and the ends of copies, and execute the actions. Acknowledge each ring after its effects."""
        self._execute(self._peer_inbox.read())
        self._peer_inbox.ack()
        self._pools.refresh()  # opens the pools of new peers, and closes those of dead ones: they stay in memory
        for inbox in self._frontend_inboxes:
            self._execute(inbox.read())
            inbox.ack()
        self._grammars.poll()
        for move, arrived, nbytes in self._executor.ended():
            now = time.monotonic()
            self._metrics.inc("migrated_bytes", nbytes)
            self._execute(self.llumlet.copied(move, now) if arrived else self.llumlet.copy_failed(move, now))
        if not self.llumlet.idle:
            self._execute(self.llumlet.tick(time.monotonic()))

    def _prepare(self, reserve: Reserve) -> None:
        """Compile the grammar of a request that a peer is about to move here."""
        known = self._journals.grammar(reserve.frontend, reserve.slot, reserve.rid, reserve.epoch)
        if known and not reserve.reservation:
            self._grammars.prepare(known)

    def _launch(self, plan: StepPlan) -> None:
        self._checked = False
        self._step_deadline = self._step_stats.deadline(self._own_cost.seconds(plan.num_tokens, 0))
        self._progress.beat(self._step_deadline)
        self._grammars.begin(plan)
        self._pipeline.launch(plan)

    def _apply_result(self, step: Step) -> None:
        """Apply the result of a step that has ended."""
        self._progress.beat(self._step_deadline)  # of the step launched last, which may still run
        now = time.monotonic()
        emissions = self._scheduler.apply_result(step.plan, step.result, now)
        self._grammars.after_step(step.plan)
        for emission in emissions:
            self._outboxes[emission.request.frontend].emit(emission)
        self._execute(self.llumlet.after_step(emissions, now, self._step_stats.step_seconds))
        self._telemetry.preempted(step.plan.preempted)
        self._count_step(step.plan, emissions, step.seconds, now)

    def _flush(self) -> None:
        """Write queued output and messages to the rings, and ring the bells of their readers."""
        for k, outbox in enumerate(self._outboxes):
            if outbox.flush():
                self._fabric.ring_bell(self._fabric.topology.frontend(k))
        self._executor.flush()

    def _wait_for_work(self) -> None:
        """Wait until the bell rings or the time is up; check the scheduler's invariants meanwhile."""
        self._step_stats.tick(time.monotonic())
        beat = IDLE_BEAT if self.llumlet.idle else MOVING_BEAT
        if not doorbell.wait(self._fabric.bell, beat) and not self._checked:
            # Only after a quiet interval: checking a large pool takes milliseconds.
            self._scheduler.check(self.llumlet.tables())
            self._checked = True
        self._progress.beat(IDLE_DEADLINE)

    # -- metrics -------------------------------------------------------------------------------

    def _count_step(self, plan: StepPlan, emissions: list[Emission], seconds: float, now: float) -> None:
        tokens = sum(len(e.tokens) for e in emissions)
        self._num_steps += 1
        self._step_stats.step(seconds, tokens, now)
        self._metrics.inc("steps")
        self._metrics.observe("step_seconds", seconds)
        self._metrics.observe("iteration_tokens", plan.num_tokens)
        self._metrics.inc("generation_tokens", tokens)
        self._metrics.inc("prompt_tokens", sum(row.count for row in plan.rows[plan.num_decodes :]))
        self._count_prefills(emissions, now)
        self._copy_scheduler_totals()

    def _count_prefills(self, emissions: list[Emission], now: float) -> None:
        for emission in emissions:
            if emission.start == 0 and (emission.tokens or emission.finish):
                request = emission.request
                self._metrics.observe("request_queue_time_seconds", request.admitted - request.params.arrival)
                self._metrics.observe("request_prefill_time_seconds", now - request.admitted)

    def _copy_scheduler_totals(self) -> None:
        """Add what the scheduler has counted since the last step to the metrics page."""
        totals = {
            "preemptions": self._scheduler.num_preemptions,
            "prefix_cache_queries": self._scheduler.prefix_query_tokens,
            "prefix_cache_hits": self._scheduler.prefix_hit_tokens,
        }
        for name, total in totals.items():
            if total != self._counted[name]:
                self._metrics.inc(name, total - self._counted[name])
                self._counted[name] = total

    # -- the board -----------------------------------------------------------------------------

    def _publish(self) -> None:
        if self._cost_interval != self._step_stats.num_intervals:
            self._cost_interval = self._step_stats.num_intervals
            self._update_cost()
        self._telemetry.state(self.state)
        self._board.publish(encode(self._facts()))

    def _update_cost(self) -> None:
        """Take the step times that equal engines have measured meanwhile, and log what follows from them."""
        if not self._cost.update(self._peer_inbox.alive()):
            return
        if self._cost.trusted:
            text = "a step takes twice its ideal time at %d tokens, nearly its ideal up to %d of KV (0: no limit)"
            log.info(text, *self._cost.limits)
        else:
            log.warning("step times differed from run to run, so they set no limits: other work uses this machine")

    def _is_busier_than(self, peer: EngineIncarnation) -> bool:
        """Return True if a move to `peer` still reduces the imbalance; False if its facts are unknown."""
        theirs = self._peer_inbox.facts_of(peer)
        return theirs is not None and self._policy.migration(self._facts()) < self._policy.migration(theirs)

    def _copy_refusal(self, peer: EngineIncarnation) -> str:
        theirs = self._peer_inbox.facts_of(peer)
        if theirs is None or theirs.fingerprint != self._identity.fingerprint:
            return "that engine has other weights, or KV of another form"
        return self._pools.refusal(peer.engine, peer.incarnation)

    def _has_same_weights(self, peer: EngineIncarnation) -> bool:
        theirs = self._peer_inbox.facts_of(peer)
        return theirs is not None and theirs.weights == self._identity.weights

    def _facts(self) -> EngineFacts:
        scheduler, blocks = self._scheduler, self._scheduler.blocks
        return EngineFacts(
            incarnation=self._fabric.incarnation,
            state=self.state,
            step=self._num_steps,
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
            consumed=[inbox.consumed for inbox in self._frontend_inboxes],
            high_running=sum(r.params.priority < 0 for r in scheduler.running.values()),
            high_waiting=sum(r.params.priority < 0 for r in scheduler.waiting),
            preempted_waiting=sum(r.preemptions > 0 for r in scheduler.waiting),
            incoming=len(self.llumlet.incoming),
            outgoing=len(self.llumlet.outgoing),
            fingerprint=self._identity.fingerprint,
            weights=self._identity.weights,
            pool_handle=self._pool_handle,
            peer_pools=self._pools.states,
            knee=self._cost.limits.knee,
            ideal_tokens=self._cost.limits.ideal_tokens,
            step_times=self._cost.packed,
            cost_group=self._cost_group,
        )


def _kv_format(spec: PoolSpec) -> str:
    return f"{spec.dtype} {spec.layers}x2x{spec.block_size}x{spec.kv_heads}x{spec.head_dim}"
