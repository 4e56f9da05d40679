"""The arrays of a step against a slow and simple computation of the same arrays."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.engine.cuda.arrays import Inputs, Size, SlotSampling, StepArrays, input_fields
from daemon.engine.cuda.slots import DUMMY
from daemon.engine.request import Request
from daemon.engine.runner import Row
from daemon.ipc.messages import RequestParams, SamplingParams

SLOTS, MAX_LEN, ROWS, TOKENS = 24, 200, 12, 400
GREEDY = SlotSampling(0.0, -np.inf, 0, 1.0, 0)


def make_request(tokens, table, sampling=None, rid=0):
    sampling = sampling or SamplingParams(max_tokens=10, seed=0)
    return Request(rid, 1, 0, RequestParams(sampling, 0.0), tokens, len(tokens), block_table=table)


def buffers(block_size):
    pages = ROWS * -(-MAX_LEN // block_size)
    fields = input_fields(Size(TOKENS, ROWS, ROWS, pages))
    return Inputs(*(np.full(length, -77, dtype) for _, dtype, length in fields))


def expected_arrays(rows, slots, block_size, draws):
    """Return the expected arrays, computed row by row and token by token."""
    out = {name: [] for name in Inputs._fields}
    out["qo_indptr"], out["kv_indptr"] = [0], [0]
    for i, ((request, start, count, sample, *_), slot) in enumerate(zip(rows, slots, strict=True)):
        length = start + count
        for position in range(start, length):
            out["tokens"].append(request.tokens[position])
            out["positions"].append(position)
            out["rows"].append(i)
        pages = [request.block_table[b] for b in range((length - 1) // block_size + 1)]
        out["kv_indices"] += pages
        out["kv_indptr"].append(len(out["kv_indices"]))
        out["qo_indptr"].append(len(out["tokens"]))
        out["slots"].append(slot)
        out["kv_lens"].append(length)
        out["last_page_len"].append(length - (len(pages) - 1) * block_size)
        if sample:
            draw = draws[slot]
            out["logits_indices"].append(len(out["tokens"]) - 1)
            out["sampled_slots"].append(slot)
            out["sample_position"].append(length)
            for name, value in zip(draw._fields, draw, strict=True):
                out[name].append(value)
    return out


def agree(inputs, size, expected):
    for name, array in inputs.cut(size)._asdict().items():
        np.testing.assert_array_equal(array, np.array(expected[name], array.dtype), err_msg=name)


@st.composite
def histories(draw):
    block_size = draw(st.sampled_from([4, 16]))
    requests = draw(st.integers(1, ROWS))
    lengths = [draw(st.integers(1, 60)) for _ in range(requests)]
    return block_size, lengths, draw(st.integers(0, 2**32))


@settings(max_examples=60, deadline=None)
@given(histories())
def test_steps_of_growing_moving_and_replaced_requests(history):
    """Block tables grow or are replaced by other lists, requests change slots, decodes and chunks alternate."""
    block_size, lengths, seed = history
    rng = np.random.default_rng(seed)
    arrays = StepArrays(SLOTS, MAX_LEN, block_size)

    def blocks(tokens, spare=0):
        return rng.integers(1, 1000, -(-tokens // block_size) + spare).tolist()

    requests = [make_request(rng.integers(0, 500, n).tolist(), blocks(n), rid=i) for i, n in enumerate(lengths)]
    free = list(rng.permutation(np.arange(1, SLOTS + 1)).tolist())
    slot_of, draws = {}, {DUMMY: GREEDY}

    def assign_slot(request):
        slot = free.pop(0)
        draws[slot] = SlotSampling(
            float(np.float32(rng.random())),
            float(np.float32(-rng.random())),
            int(rng.integers(0, 50)),
            float(rng.random()),
            int(rng.integers(-(2**63), 2**63)),
        )
        arrays.assign_slot(slot, request, draws[slot])
        if request.rid in slot_of:
            free.append(slot_of[request.rid])
        slot_of[request.rid] = slot

    for request in requests:
        assign_slot(request)
    inputs = buffers(block_size)
    dummy = make_request([0], [0])
    for _ in range(6):
        for request in requests:
            what = rng.integers(0, 6)
            if what == 0:
                request.block_table = blocks(len(request.tokens), spare=int(rng.integers(0, 3)))
            elif what == 1:
                assign_slot(request)
            for _ in range(int(rng.integers(0, 12))):
                request.tokens.append(int(rng.integers(0, 500)))
                if len(request.tokens) > len(request.block_table) * block_size:
                    request.block_table.append(int(rng.integers(1, 1000)))
        chosen = [r for r in requests if rng.random() < 0.8]
        slots = [slot_of[r.rid] for r in chosen]
        rows = [Row(r, len(r.tokens) - 1, 1, True) for r in chosen]
        bucket = min(ROWS, len(rows) + int(rng.integers(0, 4)))
        if bucket:
            padding = bucket - len(rows)
            size = arrays.decodes(rows, slots, bucket, inputs)
            padded = rows + [Row(dummy, 0, 1, True)] * padding
            agree(inputs, size, expected_arrays(padded, slots + [DUMMY] * padding, block_size, draws))
        starts = [int(rng.integers(0, len(r.tokens))) for r in chosen]
        counts = [int(rng.integers(1, min(30, len(r.tokens) - s) + 1)) for r, s in zip(chosen, starts, strict=True)]
        chunks = [Row(r, s, n, s + n == len(r.tokens)) for r, s, n in zip(chosen, starts, counts, strict=True)]
        if chunks:
            size = arrays.chunks(chunks, slots, inputs)
            agree(inputs, size, expected_arrays(chunks, slots, block_size, draws))


def test_a_row_that_does_not_fit_is_rejected():
    arrays, inputs = StepArrays(SLOTS, MAX_LEN, 16), buffers(16)
    request = make_request(list(range(20)), [3])
    arrays.assign_slot(1, request, GREEDY)
    with pytest.raises(ValueError, match="no room for 20"):
        arrays.decodes([Row(request, 19, 1, True)], [1], 1, inputs)
    request = make_request(list(range(300)), list(range(1, 30)))
    arrays.assign_slot(2, request, GREEDY)
    with pytest.raises(ValueError, match="limit of 200"):
        arrays.chunks([Row(request, 0, 210, False)], [2], inputs)


def test_a_decode_of_two_tokens_is_rejected():
    request = make_request([1, 2], [3])
    with pytest.raises(ValueError, match="one token"):
        StepArrays(SLOTS, MAX_LEN, 16).decodes([Row(request, 0, 2, True)], [1], 1, buffers(16))


@pytest.mark.parametrize(
    ("change", "hosted"),
    [
        ({}, False),
        ({"logprobs": 0}, True),
        ({"logit_bias": ((3, 1.0),)}, True),
        ({"repetition_penalty": 1.1}, True),
        ({"presence_penalty": -0.5}, True),
        ({"frequency_penalty": 0.5}, True),
        ({"top_p": 0.5, "top_k": 3}, False),
    ],
)
def test_rows_with_penalties_bias_or_logprobs_are_sampled_on_the_host(change, hosted):
    arrays = StepArrays(SLOTS, MAX_LEN, 16)
    request = make_request([1, 2, 3], [5], SamplingParams(max_tokens=5, seed=0, **change))
    arrays.assign_slot(4, request, GREEDY)
    assert arrays.host_rows([Row(request, 2, 1, True)], [4]) == ([0] if hosted else [])
    assert arrays.host_rows([Row(request, 0, 2, False)], [4]) == []


def test_the_host_samples_until_min_tokens_are_reached():
    arrays = StepArrays(SLOTS, MAX_LEN, 16)
    request = make_request([1, 2, 3], [5], SamplingParams(max_tokens=9, seed=0, min_tokens=2))
    arrays.assign_slot(4, request, GREEDY)
    assert [arrays.host_rows([Row(request, n - 1, 1, True)], [4]) for n in (3, 4, 5)] == [[0], [0], []]


def test_an_unknown_token_must_have_been_sampled_on_the_device_at_its_position():
    arrays, inputs = StepArrays(SLOTS, MAX_LEN, 16), buffers(16)
    request = make_request([1, 2, 3], [5])
    arrays.assign_slot(4, request, GREEDY)
    size = arrays.decodes([Row(request, 3, 1, True)], [4], 1, inputs)
    with pytest.raises(ValueError, match=r"positions \[3\]"):
        arrays.check_unknown(inputs, size)
    before = buffers(16)
    size_before = arrays.decodes([Row(request, 2, 1, True)], [4], 1, before)
    arrays.note_sampled(before, size_before)
    arrays.check_unknown(inputs, size)
    arrays.note_host_sampled([4])
    with pytest.raises(ValueError, match="collect"):
        arrays.check_unknown(inputs, size)
