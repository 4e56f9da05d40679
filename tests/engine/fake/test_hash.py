"""The hash runner: correct tokens with a correct pool, other tokens with any other pool."""

import random

from hypothesis import given
from hypothesis import strategies as st

from daemon.engine.fake.hash import HashRunner, expected_stream
from daemon.engine.request import Request
from daemon.engine.runner import Row, StepPlan
from daemon.ipc.messages import RequestParams, SamplingParams

VOCAB, SIZE, BLOCKS = 1 << 30, 4, 16  # the vocabulary is so large that two tokens are not equal by chance


def loaded_runner() -> tuple[HashRunner, memoryview]:
    runner = HashRunner(VOCAB, 1000, SIZE)
    pool = memoryview(bytearray(runner.pool_spec(BLOCKS).nbytes))
    runner.load(pool)
    return runner, pool.cast("Q")


def request(tokens, table, seed=0, logprobs=-1) -> Request:
    sampling = SamplingParams(max_tokens=100, seed=seed, logprobs=logprobs)
    return Request(1, 1, 0, RequestParams(sampling, 0.0), list(tokens), len(tokens), block_table=list(table))


def next_token(runner: HashRunner, req: Request, start: int, count: int) -> int:
    """Compute `count` tokens from `start`; return the token sampled after ``tokens[: start + count]``."""
    return runner.execute(StepPlan([Row(req, start, count, True)], 0)).tokens[0]


@given(st.lists(st.integers(0, 2**31), min_size=1, max_size=20), st.integers(0, 2**63), st.integers(1, 20), st.data())
def test_any_chunking_gives_the_expected_stream(prompt, seed, n, data):
    runner, _ = loaded_runner()
    req = request(prompt, data.draw(st.permutations(range(1, BLOCKS)))[:10], seed)
    start = 0
    while req.num_output < n:
        count = data.draw(st.integers(1, len(req.tokens) - start))
        sample = start + count == len(req.tokens)
        tokens = runner.execute(StepPlan([Row(req, start, count, sample)], 0)).tokens
        assert len(tokens) == sample
        req.tokens += tokens
        start += count
    assert req.tokens[len(prompt) :] == expected_stream(prompt, seed, n, VOCAB)


def test_a_token_depends_on_every_kv_entry_of_the_sequence_and_on_no_other():
    runner, pool = loaded_runner()
    table, length = [5, 2, 7, 3], 4 * SIZE - 1
    req = request(range(length), table)
    next_token(runner, req, 0, length)
    right = expected_stream(range(length), 0, 1, VOCAB)[0]
    for index in range(len(pool)):
        block, slot = index // (2 * SIZE), index % SIZE
        read = block in table and table.index(block) * SIZE + slot < length - 1
        old, pool[index] = pool[index], pool[index] ^ 1
        changed = next_token(runner, req, length - 1, 1) != right
        pool[index] = old
        next_token(runner, req, length - 1, 1)
        assert changed == read


def test_a_misplaced_or_foreign_block_changes_every_later_token():
    runner, _ = loaded_runner()
    prompt = list(range(4 * SIZE))
    right = expected_stream(prompt, 0, 6, VOCAB)
    next_token(runner, request(prompt, [1, 2, 3, 4]), 0, 16)
    other = [9, *prompt[1:]]  # only the first token differs
    next_token(runner, request(other, [8, 9, 10, 11]), 0, 16)
    for table in ([2, 1, 3, 4, 5, 6], [1, 2, 10, 4, 5, 6], [1, 2, 0, 4, 5, 6]):
        req = request(prompt, table)
        for _ in range(6):
            req.tokens.append(next_token(runner, req, len(req.tokens) - 1, 1))
        assert not set(req.tokens[16:]) & set(right)


def test_tokens_depend_on_the_seed_and_stay_in_the_vocabulary():
    streams = {tuple(expected_stream([1, 2], seed, 8, 50)) for seed in range(100)}
    assert len(streams) == 100
    assert max(map(max, streams)) == 49 and min(map(min, streams)) == 0


def test_rows_of_one_batch_are_independent():
    runner, _ = loaded_runner()
    rng = random.Random(1)
    reqs = [request([rng.randrange(9) for _ in range(6)], [2 * i + 1, 2 * i + 2], seed=i) for i in range(5)]
    tokens = runner.execute(StepPlan([Row(r, 0, 6, True) for r in reqs], 0)).tokens
    assert tokens == [expected_stream(r.tokens, i, 1, VOCAB)[0] for i, r in enumerate(reqs)]


def test_only_requests_with_logprobs_get_them():
    runner, _ = loaded_runner()
    rows = [Row(request([1], [i + 1], logprobs=top), 0, 1, True) for i, top in enumerate((-1, 0, 3))]
    result = runner.execute(StepPlan(rows, 3))
    none, chosen, top = result.logprobs
    assert none is None
    assert (chosen.logprob, chosen.top_ids) == (0.0, [])
    assert (top.logprob, top.top_ids, top.top_logprobs) == (0.0, [result.tokens[2]], [0.0])
