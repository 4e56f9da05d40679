"""The next step launched while one runs: the tokens of the very same steps taken one at a time."""

import random
from collections import deque
from itertools import count

import pytest

from daemon.control.messages import RequestParams, SamplingParams
from daemon.engine.request import Request
from daemon.engine.runner import Row, StepPlan
from tests.gpu.parts import make_gpu_runner, small_llama, tokens

OUTPUT = 40
DRAWS = {"greedy": {"temperature": 0.0}, "drawn": {"temperature": 1.0, "top_p": 0.95, "top_k": 50}}


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    return make_gpu_runner(small_llama(tmp_path_factory.mktemp("model")), blocks=600)


def requests(draws):
    rng, blocks = random.Random(0), count(1)
    made = []
    for i in range(60):
        prompt = tokens(rng, 1 + 7 * i % 90)
        params = RequestParams(SamplingParams(max_tokens=999, seed=i, **DRAWS[draws]), 0.0)
        made.append(Request(i, 1, 0, params, prompt, len(prompt), block_table=[next(blocks) for _ in range(9)]))
    return made


class Drive:
    """Takes random steps over some of the requests: decodes, and chunks of prompts beside them.

    The steps depend on `seed` alone, not on `depth`, the number of steps that may be under way.
    """

    def __init__(self, runner, requests, seed, depth):
        self.runner, self.depth, self.rng = runner, depth, random.Random(seed)
        self.waiting, self.running, self.flying = deque(requests), [], deque()
        self.unknown = 0

    def run(self):
        while self.waiting or self.running:
            while self.waiting and len(self.running) < 20 and self.rng.random() < 0.6:
                self.running.append(self.waiting.popleft())
            if len(self.flying) == self.depth:
                self._collect()
            plan = self._plan()
            if plan.rows:
                self._launch(plan)
            self.running = [r for r in self.running if r.num_computed + r.ahead < r.prompt_len + OUTPUT]
        while self.flying:
            self._collect()

    def _plan(self):
        live = [r for r in self.running if self.rng.random() < 0.9]
        decodes = [Row(r, r.num_computed + r.ahead, 1, True) for r in live if r.pending == 1]
        chunks, left = [], 128 - len(decodes)
        for r in live:
            n = min(self.rng.randint(1, 40), r.pending, left)
            if r.pending > 1 and n > 0:
                chunks.append(Row(r, r.num_computed + r.ahead, n, n == r.pending))
                left -= n
        return StepPlan([*decodes, *chunks], len(decodes))

    def _launch(self, plan):
        self.flying.append(self.runner.launch(plan))
        for row in plan.rows:
            self.unknown += row.start == len(row.request.tokens)
            row.request.ahead += row.count
            row.request.drawing = row.sample

    def _collect(self):
        ticket = self.flying.popleft()
        drawn = iter(self.runner.collect(ticket).tokens)
        for row in ticket.plan.rows:
            r = row.request
            r.ahead -= row.count
            r.num_computed += row.count
            if row.sample:
                r.tokens.append(next(drawn))
                r.drawing = r.in_flight


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("draws", DRAWS)
def test_the_same_steps_give_the_same_tokens(runner, draws, seed):
    outputs = []
    for depth in (1, 2, 2):
        made = requests(draws)
        drive = Drive(runner, made, seed, depth)
        drive.run()
        outputs.append([r.tokens for r in made])
    assert drive.unknown > 1000
    assert outputs[1] == outputs[0]
    assert outputs[2] == outputs[0]
