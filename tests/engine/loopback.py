"""A frontend and an engine in one process, connected by the real shared memory; the engine runs `HashRunner`."""

from __future__ import annotations

import os
from itertools import count

from daemon.engine.fake.hash import HashRunner
from daemon.engine.frontend_inbox import FrontendInbox
from daemon.engine.frontend_outbox import FrontendOutbox
from daemon.engine.journal_reader import JournalReader
from daemon.engine.migration.actions import Readdress, Tell
from daemon.engine.migration.llumlet import Llumlet
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
NUM_BLOCKS, BLOCK_SIZE = 100, 8
ENGINE_INCARNATION = 30


class Loopback:
    """Frontend 0, driven by the test, and the objects of engine 0."""

    def __init__(self, incarnation: int = 20) -> None:
        """`incarnation`: of the frontend."""
        topology = Topology(1, 1)
        self.handles = Fabric.create(topology, 1 << 20, 1 << 20)
        self.engine_process = topology.engine(0)
        fabric = Fabric(self.handles, self.engine_process, ENGINE_INCARNATION)
        self.runner = HashRunner(vocab_size=VOCAB, max_model_len=MAX_LEN, block_size=BLOCK_SIZE)
        self.runner.load(memoryview(bytearray(self.runner.pool_spec(NUM_BLOCKS).nbytes)))
        self.scheduler = Scheduler(
            BlockManager(NUM_BLOCKS, BLOCK_SIZE),
            max_num_seqs=16,
            max_batch_tokens=64,
            max_model_len=MAX_LEN,
            eos_token_ids=(),
        )
        self.outbox = FrontendOutbox(fabric.writer(topology.frontend(0)))
        self.view = JournalView(fabric.journal(0))
        journals = JournalReader([self.view])
        self.llumlet = Llumlet(self.scheduler, journals)
        self.inbox = FrontendInbox(0, ENGINE_INCARNATION, fabric.reader(topology.frontend(0)), journals, self.llumlet)
        self._rids = count(incarnation << 32)
        self.restart_frontend(incarnation)

    def restart_frontend(self, incarnation: int, *, adopt: bool = False) -> None:
        """Replace the frontend by a new incarnation with an empty journal, or with the one of its predecessor."""
        self.incarnation = incarnation
        frontend = Fabric(self.handles, 1, incarnation)
        self.journal = Journal(frontend.journal(0, writable=True), adopt=adopt, generation=incarnation)
        self.commands = frontend.writer(self.engine_process)
        self.outputs = frontend.reader(self.engine_process)

    def close(self) -> None:
        """Close the shared memory."""
        for fd in (self.handles.segment, *self.handles.journals, *self.handles.outboxes, *self.handles.doorbells):
            os.close(fd)

    # -- the frontend's side -------------------------------------------------------------------

    def journal_request(self, prompt: list[int], max_tokens: int = 5, seed: int = 3, epoch: int = 1) -> Start:
        """Journal a request, and return the command that would start it."""
        rid = next(self._rids)
        slot = self.journal.open(rid, RequestParams(SamplingParams(max_tokens, seed), 1.0), prompt)
        self.journal.assign(slot, epoch, 0, ENGINE_INCARNATION)
        return Start(rid, epoch, slot, len(prompt))

    def send(self, *messages: ToEngine, receiver: int = ENGINE_INCARNATION) -> None:
        """Send the messages, and let the engine read them all at once."""
        for message in messages:
            assert self.commands.put(encode(message), receiver)
        self.read_commands()

    def receive(self) -> list[ToFrontend]:
        """Return all messages on the ring for this incarnation of the frontend."""
        found: list[ToFrontend] = []
        while (record := self.outputs.read()) is not None:
            if self.journal.generation <= record.receiver <= self.incarnation:
                found.append(decode_to_frontend(record.payload))
        self.outputs.ack()
        return found

    def receive_streams(self) -> dict[int, list[int]]:
        """Return the tokens on the ring by request; each row must begin where the last one ended."""
        found: dict[int, list[int]] = {}
        for message in self.receive():
            assert isinstance(message, StepOutput)
            tokens = iter(message.tokens)
            for rid, start, n in zip(message.rids, message.starts, message.counts, strict=True):
                assert start == len(found.setdefault(rid, []))
                found[rid] += [next(tokens) for _ in range(n)]
        return found

    # -- the engine's side ---------------------------------------------------------------------

    def read_commands(self) -> None:
        """Read the frontend's commands, execute the actions and acknowledge, as the worker does."""
        for action in self.inbox.read():
            match action:
                case Tell(_, message):
                    self.outbox.tell(message)
                case Readdress(_, incarnation):
                    self.outbox.readdress(incarnation)
                case _:
                    raise AssertionError(f"there is no other engine, but the llumlet returned {action}")
        self.inbox.ack()

    def step(self) -> bool:
        """Run one step of the engine; return False if it had nothing to compute."""
        plan = self.scheduler.plan(0.0)
        if plan is not None:
            for emission in self.scheduler.apply_result(plan, self.runner.execute(plan), 0.0):
                self.outbox.emit(emission)
        self.outbox.flush()
        self.scheduler.check()
        return plan is not None

    def held_rids(self) -> set[int]:
        """Return the ids of the requests that the engine holds."""
        return set(self.scheduler.running) | {r.rid for r in self.scheduler.waiting}
