"""The parts of an engine that follow grammars, in one thread: scheduler, pipeline, hash engine and grammars."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np

from daemon.engine.fake.hash import HashRunner, expected_stream
from daemon.engine.fake.masked import token_ids
from daemon.engine.grammar.grammars import Grammars
from daemon.engine.pipeline import Pipeline
from daemon.engine.request import Request
from daemon.engine.runner import Runner
from daemon.engine.scheduler import Emission, Scheduler
from daemon.ipc.messages import Finish, RequestParams, SamplingParams
from daemon.kvpool.block_manager import BlockManager
from daemon.models.grammar.source import GrammarKind, GrammarSource, to_llguidance
from daemon.models.grammar.vocabulary import Vocabulary
from tests.models.tiny_model import EOS_ID

VOCAB, BLOCK_SIZE = 384, 8
PROMPT = list(range(10, 30))


def grammar_of(kind: GrammarKind, text: str) -> str:
    return to_llguidance(GrammarSource(kind, text))


REGEX = grammar_of(GrammarKind.REGEX, "[a-c]{30}(x|yz)")


def make_request(rid: int, grammar: str = REGEX, output: Sequence[int] = (), **sampling: object) -> Request:
    """Return a request as the journal's reader makes it."""
    ends = (EOS_ID,) if grammar else ()
    options = {"max_tokens": 60, "seed": rid, "stop_token_ids": ends} | sampling
    params = RequestParams(SamplingParams(grammar=grammar, **options), arrival=float(rid))
    return Request(rid, 1, 0, params, [*PROMPT, *output], len(PROMPT))


class GrammarEngine:
    """One engine. Its requests are watched as the journal's reader does it."""

    def __init__(
        self,
        load: Callable[[], Vocabulary],
        *,
        blocks: int = 100,
        max_num_seqs: int = 8,
        runner: Runner | None = None,
    ) -> None:
        self._bell = threading.Event()
        self.grammars = Grammars(load, threads=2, wake=self._bell.set)
        self.scheduler = Scheduler(
            BlockManager(blocks, BLOCK_SIZE),
            max_num_seqs=max_num_seqs,
            max_batch_tokens=64,
            max_model_len=400,
            eos_token_ids=(),
        )
        self.runner = runner or HashRunner(VOCAB, 400, BLOCK_SIZE)
        self.runner.load(memoryview(bytearray(self.runner.pool_spec(blocks).nbytes)))
        self.pipeline = Pipeline(self.runner)
        self.finished: dict[int, Finish] = {}

    def add(self, *requests: Request) -> None:
        for request in requests:
            if request.sampling.grammar:
                self.grammars.watch(request)
            assert self.scheduler.add(request)

    def step(self) -> list[Emission]:
        """Plan, launch, collect and apply as the worker does. Return no emission if nothing could be planned."""
        self.grammars.poll()
        plan = None if self.pipeline.closed else self.scheduler.plan(0.0)
        if plan is not None:
            self.grammars.begin(plan)
            self.pipeline.launch(plan)
        step = self.pipeline.collect(leave=0 if plan is None else 1)
        if step is None:
            return []
        emissions = self.scheduler.apply_result(step.plan, step.result, 0.0)
        self.grammars.after_step(step.plan)
        self.finished |= {e.request.rid: e.finish for e in emissions if e.finish}
        self.scheduler.check()
        return emissions

    def run(self, *, seconds: float = 20.0) -> None:
        """Run until no request is left."""
        while self.scheduler.running or self.scheduler.waiting or len(self.pipeline):
            if not self.step() and not len(self.pipeline):
                assert self._bell.wait(seconds)
                self._bell.clear()


def expected_output(vocabulary: Vocabulary, request: Request) -> list[int]:
    """Return the only correct output of the request, up to its end token."""
    prompt, sampling = request.tokens[: request.prompt_len], request.sampling
    matcher = vocabulary.compile(sampling.grammar)
    followed: list[int] = []

    def allowed(output: Sequence[int]) -> Sequence[int]:
        if EOS_ID in output:
            return [EOS_ID]  # what comes after the end is cut off below
        assert matcher.consume_tokens(list(output[len(followed) :]))
        followed[:] = output
        return token_ids(np.frombuffer(matcher.compute_bitmask(), np.int32)).tolist()

    found = expected_stream(prompt, sampling.seed, sampling.max_tokens, VOCAB, allowed)
    return found[: found.index(EOS_ID) + 1] if EOS_ID in found else found
