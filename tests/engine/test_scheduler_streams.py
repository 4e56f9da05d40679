"""The scheduler, the block manager and the hash runner as one engine, with random events.

Every client must get exactly the stream that its prompt and seed determine, and each logprob of its prompt once, and
no block may be lost, for any pool, chunking, preemptions, shared prefixes, cancels, resumes, changes of priority and
reservations.
"""

import random
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.engine.fake.hash import HashRunner, expected_prompt_logprobs, expected_stream
from daemon.engine.pipeline import Pipeline
from daemon.engine.request import Request
from daemon.engine.scheduler import Scheduler
from daemon.ipc.messages import Finish, RequestParams, SamplingParams
from daemon.ipc.prompt_logprobs import record_bytes, unpack
from daemon.kvpool.block_manager import BlockManager

VOCAB, EOS = 40, 7


@dataclass
class Client:
    """One request, the event that happens to it and the output that it has received."""

    prompt: list[int]
    sampling: SamplingParams
    priority: int
    arrives: int
    event: str  # "none", "cancel", "resume" or "reprioritise", at step `at`
    at: int
    new_priority: int  # for "reprioritise"
    stream: list[int] = field(default_factory=list)
    scored: list[float] = field(default_factory=list)  # logprobs of the prompt
    finish: Finish = Finish.NONE

    def request(self, rid: int, epoch: int) -> Request:
        params = RequestParams(self.sampling, float(self.arrives), self.priority)
        request = Request(rid, epoch, 0, params, [*self.prompt, *self.stream], len(self.prompt))
        request.unscored = max(0, request.unscored - len(self.scored))  # as a reader of the journal does
        return request


@dataclass
class Engine:
    capacity: int  # of the pool, tokens
    block_size: int
    max_num_seqs: int
    max_batch_tokens: int
    max_model_len: int
    prefix_caching: bool
    overlap: bool
    max_mixed_tokens: int

    @property
    def num_blocks(self) -> int:
        return self.capacity // self.block_size + 1

    def build(self) -> tuple[Scheduler, HashRunner]:
        blocks = BlockManager(self.num_blocks, self.block_size, self.prefix_caching)
        scheduler = Scheduler(
            blocks,
            max_num_seqs=self.max_num_seqs,
            max_batch_tokens=self.max_batch_tokens,
            max_model_len=self.max_model_len,
            eos_token_ids=(EOS,),
            max_mixed_tokens=self.max_mixed_tokens,
        )
        runner = HashRunner(VOCAB, self.max_model_len, self.block_size)
        garbage = random.Random(0).randbytes(runner.pool_spec(self.num_blocks).nbytes)
        runner.load(memoryview(bytearray(garbage)))
        return scheduler, runner


def expected(client: Client, max_len: int) -> tuple[list[int], Finish]:
    """Return stream and finish by the rules of the API, without an engine."""
    s = client.sampling
    room = min(s.max_tokens, max_len - len(client.prompt))
    stream = expected_stream(client.prompt, s.seed, room, VOCAB)
    for i, token in enumerate(stream, 1):
        if i >= s.min_tokens and (token in s.stop_token_ids or (token == EOS and not s.ignore_eos)):
            return stream[:i], Finish.STOP
    return stream, Finish.LENGTH


samplings = st.builds(
    SamplingParams,
    max_tokens=st.integers(0, 30),
    seed=st.integers(0, 2**64 - 1),
    min_tokens=st.integers(0, 6),
    ignore_eos=st.booleans(),
    stop_token_ids=st.sampled_from([(), (), (3, 11)]),
    prompt_logprobs=st.sampled_from([-1, -1, 0, 2]),
)
prompts = st.tuples(st.sampled_from([0, 1]), st.integers(0, 30), st.lists(st.integers(0, 3), min_size=1, max_size=8))
clients = st.builds(
    Client,
    prompt=prompts.map(lambda p: [p[0]] * p[1] + p[2]),
    sampling=samplings,
    priority=st.sampled_from([0, 0, 0, 1, -1]),
    arrives=st.integers(0, 20),
    event=st.sampled_from(["none", "none", "none", "cancel", "resume", "reprioritise", "reprioritise"]),
    at=st.integers(0, 60),
    new_priority=st.integers(-2, 2),
)
engines = st.builds(
    Engine,
    capacity=st.integers(16, 120),
    block_size=st.sampled_from([1, 2, 4, 8]),
    max_num_seqs=st.integers(1, 6),
    max_batch_tokens=st.integers(1, 24),
    max_model_len=st.sampled_from([24, 60, 90]),
    prefix_caching=st.booleans(),
    overlap=st.booleans(),
    max_mixed_tokens=st.sampled_from([0, 0, 1, 5, 12]),
)
reservations = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 20), st.integers(1, 15)), max_size=3)


class Run:
    """Runs steps of the engine until every request has ended. `step` is the clock."""

    def __init__(self, engine: Engine, clients: list[Client], reservations: list[tuple[int, int, int]]):
        self.engine, self.clients = engine, clients
        self.scheduler, self.runner = engine.build()
        self.pipeline = Pipeline(self.runner, overlap=engine.overlap)
        self.reservations, self.reserved = reservations, []
        self.step = 0

    def trigger_events(self, before_plan: bool) -> None:
        """Let events happen. Arrivals and reservations come before the plan, other events also before the result."""
        for rid, client in enumerate(self.clients):
            if before_plan and client.arrives == self.step:
                self.arrive(rid, client)
            elif client.at == self.step and client.at > client.arrives and before_plan == (rid % 2 == 0):
                self.trigger_event(rid, client)
        if before_plan:
            self.reserve()

    def arrive(self, rid: int, client: Client) -> None:
        request = client.request(rid, 1)
        if self.scheduler.refuse(request):
            client.finish = Finish.ERROR
        else:
            assert self.scheduler.add(request)
            assert not self.scheduler.add(client.request(rid, 1))

    def trigger_event(self, rid: int, client: Client) -> None:
        if client.finish or client.event == "none":
            return
        assert not self.scheduler.cancel(rid, 0)
        if client.event == "cancel":
            assert self.scheduler.cancel(rid, 1)
            client.finish = Finish.CANCELLED
        elif client.event == "resume":
            assert self.scheduler.add(client.request(rid, 2))
        else:
            client.priority = client.new_priority
            self.scheduler.reprioritise(self.scheduler.get(rid), client.new_priority)

    def reserve(self) -> None:
        """Hold blocks for some steps, as a migration does: (first step, blocks, steps)."""
        blocks = self.scheduler.blocks
        for until, table in self.reserved:
            if until == self.step:
                blocks.free(table)
        self.reserved = [(until, table) for until, table in self.reserved if until > self.step]
        for start, n, steps in self.reservations:
            if start == self.step and blocks.can_allocate(n):
                self.reserved.append((start + steps, blocks.allocate(n)))

    def check_plan(self, plan) -> None:
        size = self.engine.block_size
        assert plan.num_tokens <= self.engine.max_batch_tokens
        if self.engine.max_mixed_tokens and 0 < plan.num_decodes < len(plan.rows):
            assert plan.num_tokens <= max(self.engine.max_mixed_tokens, plan.num_decodes + size)
        assert len(self.scheduler.running) <= self.engine.max_num_seqs
        assert len({row.request.rid for row in plan.rows}) == len(plan.rows)
        for i, (request, start, count, sample, *_) in enumerate(plan.rows):
            assert start == request.num_computed + request.num_inflight_tokens - count and count >= 1
            assert sample == (start + count >= len(request.tokens))
            assert len(request.block_table) * size >= start + count
            assert (i < plan.num_decodes) <= (count == 1 and sample)
        for victim in plan.preempted:  # it may run again at once if its prefix is in a block of another request
            others = [r for r in self.scheduler.running.values() if r is not victim]
            least = self.scheduler._urgency(victim, self.step)
            assert all(self.scheduler._urgency(r, self.step) < least for r in others)

    def advance(self) -> None:
        self.trigger_events(before_plan=True)
        plan = self.scheduler.plan(float(self.step))
        idle = not self.scheduler.running and not self.scheduler.waiting
        assert (plan is None) <= (idle or bool(self.reserved) or len(self.pipeline) > 0)
        if plan:
            self.check_plan(plan)
            self.pipeline.launch(plan)
        self.trigger_events(before_plan=False)
        if done := self.pipeline.collect(leave=1 if plan else 0):
            self.receive(self.scheduler.apply_result(done.plan, done.result, float(self.step)))
        self.scheduler.check([table for _, table in self.reserved])
        waiting = list(self.scheduler.waiting)
        assert self.scheduler.waiting_tokens == sum(len(r.tokens) for r in waiting)
        assert waiting == sorted(waiting, key=lambda r: self.scheduler._urgency(r, self.step))
        for request in (*self.scheduler.running.values(), *waiting):
            assert request.params.priority == self.clients[request.rid].priority
        self.step += 1

    def receive(self, emissions) -> None:
        for request, start, tokens, finish, _, scored in emissions:
            client = self.clients[request.rid]
            assert not client.finish and start == len(client.stream)
            if scored is not None:
                assert scored.start == len(client.scored)
                found = unpack(scored.records, record_bytes(client.sampling.prompt_logprobs))
                client.scored += [entry.logprob for entry in found]
            if tokens and client.sampling.prompt_logprobs >= 0:
                assert len(client.scored) == len(client.prompt) - 1, "output before the prompt is scored"
            client.stream += tokens
            client.finish = finish

    def run_to_the_end(self) -> None:
        """Run until all requests have ended. Each step computes at least for the most urgent request in the batch,
        so the total work bounds the number of steps."""
        work = sum(len(c.prompt) + c.sampling.max_tokens for c in self.clients)
        while self.step <= 60 or not all(c.finish for c in self.clients):
            assert self.step <= 60 + 2 * work, "starved"
            self.advance()


@settings(max_examples=300, deadline=None)
@given(engines, st.lists(clients, min_size=1, max_size=10), reservations)
def test_every_stream_is_correct_and_no_block_is_lost(engine, clients, reservations):
    run = Run(engine, clients, reservations)
    run.run_to_the_end()
    for client in clients:
        stream, finish = expected(client, run.scheduler.max_len)
        if client.finish in (Finish.STOP, Finish.LENGTH):
            assert (client.stream, client.finish) == (stream, finish)
        else:
            assert client.stream == stream[: len(client.stream)]
        scored = expected_prompt_logprobs(client.prompt) if client.sampling.prompt_logprobs >= 0 else []
        assert client.scored == (
            scored if client.finish in (Finish.STOP, Finish.LENGTH) else scored[: len(client.scored)]
        )
    assert run.scheduler.blocks.num_used == 0
    assert run.scheduler.plan(1e9) is None
