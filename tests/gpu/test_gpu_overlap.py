"""Overlapped steps give the same tokens as the same steps one at a time."""

import random
from collections import deque
from itertools import count

import pytest

from daemon.engine.request import Request
from daemon.ipc.messages import RequestParams, SamplingParams
from tests.engine.cuda.harness import RandomSteps
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


class Drive(RandomSteps):
    """Takes random steps over some of the requests: decodes, and chunks of prompts beside them.

    The steps depend only on `seed`, not on `depth`, the number of steps that may be in flight.
    """

    def __init__(self, runner, requests, seed, depth):
        super().__init__(runner, random.Random(seed))
        self.depth, self.waiting = depth, deque(requests)

    def run(self):
        while self.waiting or self.running:
            while self.waiting and len(self.running) < 20 and self.rng.random() < 0.6:
                self.running.append(self.waiting.popleft())
            if len(self.in_flight) == self.depth:
                self.collect()
            plan = self.plan()
            if plan.rows:
                self.launch(plan)
            self.running = [r for r in self.running if r.num_computed + r.num_inflight_tokens < r.prompt_len + OUTPUT]
        while self.in_flight:
            self.collect()


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
