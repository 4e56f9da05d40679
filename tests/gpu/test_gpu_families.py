"""Greedy answers of a small random bf16 model of each family, against Transformers in float32."""

import random
from itertools import count

import pytest
import torch

from daemon.engine.cuda import kernels
from daemon.models.loader import open_model
from tests.engine.cpu.harness import generate, request
from tests.gpu.parts import SIMULATED, judge_greedy, make_gpu_runner, small_family, tokens, transformers_bf16
from tests.models.tiny_families import FAMILIES

CLOSE, RARE = 2e-2, 0.06


@pytest.mark.parametrize("kind", FAMILIES, ids=str)
def test_greedy_tokens(kind, tmp_path, report_figure):
    """Prompts in chunks beside decodes, longer than the windows; decodes by graphs."""
    path = small_family(tmp_path, FAMILIES[kind])
    arch = kernels.arch_of(*torch.cuda.get_device_capability())
    try:
        kernels.check(kernels.required(open_model(path), arch=arch), arch)
    except kernels.KernelError as e:
        pytest.skip(str(e))
    runner = make_gpu_runner(path, max_num_seqs=8, blocks=120)
    rng, blocks = random.Random(0), count(1)
    many = 5 if SIMULATED else 20
    answers = []
    for _ in range(many):
        batch = [request(tokens(rng, rng.randint(1, 120)), blocks, 144) for _ in range(4)]
        generate(runner, batch, output=16, chunk=50, budget=120)
        answers += [(r.tokens, r.prompt_len) for r in batch]
        blocks = count(1)
    # On the CPU: on the device it computes experts by operations that depend on the version of Transformers.
    found = judge_greedy(transformers_bf16(path, "cpu"), answers)
    report_figure(
        f"{kind}: {found.different} of {found.positions} greedy tokens differ, "
        f"the reference leads by {found.worst:.1e} of its logit at most"
    )
    assert found.worst <= CLOSE
    assert found.different <= RARE * found.positions
