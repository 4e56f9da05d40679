"""The sampling kernel gives exactly the tokens of the CPU's sampler."""

import numpy as np
import pytest
import torch

from daemon.engine.cuda.sampler import KernelSampler, SamplingTensors
from tests.engine.cuda.draws import cpu_tokens, many_rows, params_of
from tests.gpu.parts import DEVICE, SIMULATED

VOCABS = [1, 3, 300, 32003, 49152, 128256, 262144, 600000]
ROWS = [1, 2, 8, 64, 132, 256]
REPLAYS = 20 if SIMULATED else 1000


@pytest.mark.parametrize("vocab", VOCABS)
def test_every_vocabulary_and_batch(vocab):
    rng = np.random.default_rng(vocab)
    logits, samplings, positions = many_rows(vocab, rng, max(ROWS))
    expected, params = cpu_tokens(logits, samplings, positions), params_of(samplings, positions, DEVICE)
    on_device, sampler = torch.from_numpy(logits).to(DEVICE), KernelSampler(max(ROWS), vocab, DEVICE)
    for rows in ROWS:
        got = sampler.sample(on_device[:rows], params.rows(0, rows))
        assert got.tolist() == expected[:rows]


@pytest.mark.parametrize("vocab", VOCABS[:5])
def test_rows_at_any_address_and_stride(vocab):
    """Rows begin at an unaligned address, and there are gaps between them."""
    rows, rng = 40, np.random.default_rng(vocab)
    logits, samplings, positions = many_rows(vocab, rng, rows)
    expected, params = cpu_tokens(logits, samplings, positions), params_of(samplings, positions, DEVICE)
    sampler = KernelSampler(rows, vocab, DEVICE)
    for offset, gap in ((1, 0), (3, 0), (0, 5), (1, 2), (2, 3)):
        memory = torch.full((offset + rows * (vocab + gap),), torch.inf, device=DEVICE)
        view = memory[offset:].view(rows, vocab + gap)[:, :vocab]
        view.copy_(torch.from_numpy(logits))
        out = torch.full((rows + 2,), -7, dtype=torch.int32, device=DEVICE)
        assert sampler.sample(view, params, out).tolist() == expected
        assert out[rows:].tolist() == [-7, -7]


@pytest.mark.parametrize(("vocab", "rows"), [(49152, 8), (128256, 1), (128256, 64)])
def test_many_replays_with_other_inputs(vocab, rows):
    rng = np.random.default_rng(rows)
    bank = [many_rows(vocab, rng, rows) for _ in range(8)]
    expected = [cpu_tokens(*inputs) for inputs in bank]
    logits = [torch.from_numpy(inputs[0]).to(DEVICE) for inputs in bank]
    params = [params_of(samplings, positions, DEVICE) for _, samplings, positions in bank]
    static, static_params = logits[0].clone(), SamplingTensors(*(column.clone() for column in params[0]))
    sampler, out = KernelSampler(rows, vocab, DEVICE), torch.zeros(rows, dtype=torch.int32, device=DEVICE)
    sampler.sample(static, static_params, out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sampler.sample(static, static_params, out)
    seen = []
    for i in rng.integers(0, len(bank), REPLAYS).tolist():
        static.copy_(logits[i])
        for into, value in zip(static_params, params[i], strict=True):
            into.copy_(value)
        graph.replay()
        seen.append((i, out.clone()))
    assert [i for i, got in seen if got.tolist() != expected[i]] == []
