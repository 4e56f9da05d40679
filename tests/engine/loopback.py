"""A frontend and an engine in one process, joined by the real fabric; the engine computes hashes."""

from __future__ import annotations

import os
from itertools import count

from daemon.engine.fake.hash import HashRunner
from daemon.engine.frontend_inbox import FrontendInbox
from daemon.engine.frontend_outbox import FrontendOutbox
from daemon.engine.journal_reader import JournalReader
from daemon.engine.migration.llumlet import Action, Llumlet, Tell
from daemon.engine.scheduler import Scheduler
from daemon.ipc.fabric import Fabric, Topology
from daemon.ipc.journal import Journal, JournalView
from daemon.ipc.messages import (
    RequestParams,
    SamplingParams,
    Start,
    StepOutput,
    ToEngine,
    ToFrontend,
    decode_to_frontend,
    encode,
)
from daemon.kvpool.block_manager import BlockManager

VOCAB = 1000
MAX_LEN = 200
ENGINE_INCARNATION = 30


class Lane:
    """Frontend 0 by hand, engine 0 by its own objects."""

    def __init__(self, incarnation: int = 20) -> None:
        topology = Topology(1, 1)
        self.handles = Fabric.create(topology, 1 << 20)
        self.engine_process = topology.engine(0)
        fabric = Fabric(self.handles, self.engine_process, ENGINE_INCARNATION)
        runner = HashRunner(vocab_size=VOCAB, max_model_len=MAX_LEN, block_size=8)
        runner.load(memoryview(bytearray(runner.pool_spec(100).nbytes)))
        self.runner = runner
        self.scheduler = Scheduler(
            BlockManager(100, 8), max_num_seqs=16, max_batch_tokens=64, max_model_len=MAX_LEN, eos_token_ids=()
        )
        self.outbox = FrontendOutbox(fabric.writer(topology.frontend(0)))
        self.view = JournalView(fabric.journal(0))
        records = JournalReader([self.view])
        self.llumlet = Llumlet(self.scheduler, records)
        self.inbox = FrontendInbox(0, ENGINE_INCARNATION, fabric.reader(topology.frontend(0)), records, self.llumlet,
                           self.outbox, self._carry_out)  # fmt: skip
        self._rids = count(incarnation << 32)
        self.restart_frontend(incarnation)

    def _carry_out(self, actions: list[Action]) -> None:
        for action in actions:  # there is no other engine to speak of
            assert isinstance(action, Tell)
            self.outbox.tell(action.message)

    def restart_frontend(self, incarnation: int) -> None:
        self.incarnation = incarnation
        frontend = Fabric(self.handles, 1, incarnation)
        self.journal = Journal(frontend.journal(0, writable=True))
        self.commands = frontend.writer(self.engine_process)
        self.outputs = frontend.reader(self.engine_process)

    def close(self) -> None:
        for fd in (self.handles.segment, *self.handles.journals, *self.handles.doorbells):
            os.close(fd)

    # -- as the frontend -----------------------------------------------------------------------

    def write(self, prompt: list[int], max_tokens: int = 5, seed: int = 3, epoch: int = 1) -> Start:
        """Journal a request, and give back the command that would start it."""
        rid = next(self._rids)
        slot = self.journal.open(rid, RequestParams(SamplingParams(max_tokens, seed), 1.0), prompt)
        self.journal.assign(slot, epoch, 0, ENGINE_INCARNATION)
        return Start(rid, epoch, slot, len(prompt))

    def tell(self, *messages: ToEngine, receiver: int = ENGINE_INCARNATION) -> None:
        """Send, and have the engine take it."""
        for message in messages:
            assert self.commands.put(encode(message), receiver)
        self.inbox.drain()

    def hear(self) -> list[ToFrontend]:
        """All that is on the ring for this incarnation."""
        found: list[ToFrontend] = []
        while (record := self.outputs.read()) is not None:
            if record.receiver == self.incarnation:
                found.append(decode_to_frontend(record.payload))
        self.outputs.ack()
        return found

    def streams(self) -> dict[int, list[int]]:
        """Tokens by request, of all that is on the ring; each row must begin where the last one ended."""
        found: dict[int, list[int]] = {}
        for message in self.hear():
            assert isinstance(message, StepOutput)
            tokens = iter(message.tokens)
            for rid, start, n in zip(message.rids, message.starts, message.counts, strict=True):
                assert start == len(found.setdefault(rid, []))
                found[rid] += [next(tokens) for _ in range(n)]
        return found

    # -- as the engine -------------------------------------------------------------------------

    def step(self) -> bool:
        """One step of the engine; False if it had nothing to do."""
        plan = self.scheduler.plan(0.0)
        if plan is not None:
            for emission in self.scheduler.apply_result(plan, self.runner.execute(plan), 0.0):
                self.outbox.emit(emission)
        self.outbox.flush()
        self.scheduler.check()
        return plan is not None

    def here(self) -> set[int]:
        """Requests that the engine holds."""
        return set(self.scheduler.running) | {r.rid for r in self.scheduler.waiting}
