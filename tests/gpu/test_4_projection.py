"""bf16 matrices multiplied into float32, in a CUDA graph too."""

import pytest
import torch

from daemon.engine.cuda.ops import FlashInferOps
from tests.gpu.parts import BF16, DEVICE


@pytest.mark.parametrize("vocab", [384, 32003, 49152, 128256])
@pytest.mark.parametrize("rows", [1, 8, 24, 256])
def test_captured_and_replayed(rows, vocab):
    ops, weight = FlashInferOps(), torch.randn(vocab, 512, device=DEVICE).to(BF16)
    x, out = torch.zeros(rows, 512, dtype=BF16, device=DEVICE), torch.zeros(rows, vocab, device=DEVICE)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ops.project(x, weight, out)
    stream.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        ops.project(x, weight, out)
    for _ in range(3):
        x.copy_(torch.randn(rows, 512, device=DEVICE))
        graph.replay()
        expected = x.float() @ weight.float().t()
        torch.testing.assert_close(out, expected, rtol=1e-3, atol=5e-3)
        assert not torch.equal(out, out.to(BF16).float())  # they were not rounded on the way
