"""What the tests on a GPU are made of: passes by hand, runners, and Transformers as the judge of tokens."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from daemon.engine.cuda.arrays import Inputs, Size, StepArrays
from daemon.engine.cuda.attention import Attention, Heads
from daemon.engine.cuda.forward import Buffer, Room, Staged, _packed
from daemon.engine.cuda.runner import CudaRunner
from daemon.engine.request import Request
from daemon.engine.runner import Row
from daemon.ipc.messages import RequestParams, SamplingParams
from daemon.models.model_config import ModelConfig, read_model_config
from tests.models.tiny_model import make_tiny_llama

DEVICE = "cuda:0"
SIMULATED = "SIMGPU" in os.environ
"""The device is simulated (tools.simgpu): the long tests take less of everything."""

BF16 = torch.bfloat16


def model_config_of(head_dim: int) -> ModelConfig:
    """A small model's card, of no files."""
    return ModelConfig(
        path=Path("."),
        name=f"head_dim {head_dim}",
        vocab_size=384,
        hidden_size=256,
        intermediate_size=512,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=head_dim,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        rope_scaling=None,
        max_position=2048,
        tie_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        eos_token_ids=(2,),
    )


def small_llama(path: Path, **options: Any) -> Path:
    """A bf16 model directory whose heads the kernels know."""
    defaults = {
        "hidden": 256,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 64,
        "layers": 3,
        "dtype": "bfloat16",
        "max_position": 2048,
    }
    return make_tiny_llama(path, **defaults | options)


def make_gpu_runner(path: Path, *, blocks: int = 400, **options: Any) -> CudaRunner:
    """A loaded runner with a pool of noise: whatever reads KV that was never written shows."""
    defaults: dict[str, Any] = {
        "device": DEVICE,
        "dtype": "bf16",
        "load_format": "auto",
        "block_size": 16,
        "max_num_seqs": 24,
        "max_batch_tokens": 128,
        "max_model_len": 512,
    }
    settings = defaults | options
    config = read_model_config(path, load_format=settings["load_format"])
    settings["kv_memory"] = (
        blocks * 2 * config.num_layers * settings["block_size"] * config.num_kv_heads * config.head_dim
    )
    settings["kv_memory"] *= 1 if settings.get("kv_dtype") == "fp8" else 2
    runner = CudaRunner(config, **settings)
    runner.load()
    runner.pool_memory.view(-1)[runner.pool_spec(1).block_bytes :].fill_(0x41)  # about 10; 2 in e4m3
    runner._settle()
    return runner


def tokens(rng: random.Random, n: int) -> list[int]:
    return [rng.randrange(3, 380) for _ in range(n)]


def blank(rid: int, length: int, table: list[int]) -> Request:
    params = RequestParams(SamplingParams(max_tokens=1, seed=0), 0.0)
    return Request(rid, 1, 0, params, [0] * length, length, block_table=table)


# -- a pass of attention by hand


class Span(NamedTuple):
    """Its last `count` of `length` tokens are computed."""

    length: int
    count: int = 1


class Bench:
    """The arrays of passes over one pool, on the host and on the device, as a runner has them.

    Block tables are shuffled over the pool. `turns`: sets of staging buffers.
    """

    def __init__(self, heads: Heads, *, rows: int, max_len: int, tokens: int, turns: int = 2) -> None:
        self.heads = heads
        pages = rows * -(-max_len // heads.block_size)
        size, chunks = Size(rows, rows, rows, pages), Size(tokens, rows, rows, pages)
        room = Room(decodes=size, chunks=chunks, sampled=rows, vocab_size=1, slots=rows)
        pinned = DEVICE != "cpu"
        self.staged = [Staged(turn, room, pinned=pinned) for turn in range(turns)]
        self.pages = pages
        self._arrays = StepArrays(rows, max_len, heads.block_size)
        self._decodes, self._chunks = (
            Buffer(packed, torch.zeros(packed.nbytes, dtype=torch.uint8, device=DEVICE))
            for packed in (_packed(size), _packed(chunks))
        )
        self._turn = 0
        self._orders: dict[tuple[int, int], list[int]] = {}

    def rows(self, sequences: Sequence[Span], blocks: int, seed: int = 0) -> list[Row]:
        """The sequences in blocks of their own, of a pool of `blocks`."""
        if (blocks, seed) not in self._orders:
            self._orders[blocks, seed] = random.Random(seed).sample(range(1, blocks), blocks - 1)
        free = iter(self._orders[blocks, seed])
        made = []
        for rid, (length, count) in enumerate(sequences):
            table = [next(free) for _ in range(-(-length // self.heads.block_size))]
            made.append(Row(blank(rid, length, table), length - count, count, True))
        return made

    def prepare(self, attention: Attention, bucket: int) -> None:
        staged = self.staged[0]
        self._arrays.decodes([], [], bucket, staged.decode_arrays)
        attention.prepare(bucket, self._decodes.tensors, staged.decodes.tensors)

    def plan_decodes(self, attention: Attention, rows: Sequence[Row], bucket: int) -> Inputs:
        """What the device computes `rows` from, once `attention` has laid the work out."""
        staged = self._next()
        size = self._arrays.decodes(rows, range(1, len(rows) + 1), bucket, staged.decode_arrays)
        self._decodes.copy_from(staged.decodes, size.pages)
        attention.plan(staged.decodes.tensors, self._decodes.tensors, size, decode=True, turn=staged.turn)
        return self._decodes.tensors.cut(Size(bucket, bucket, bucket, self.pages))

    def plan_chunks(self, attention: Attention, rows: Sequence[Row]) -> Inputs:
        staged = self._next()
        size = self._arrays.chunks(rows, range(1, len(rows) + 1), staged.chunk_arrays)
        self._chunks.copy_from(staged.chunks, size.pages)
        inputs = self._chunks.tensors.cut(size)
        attention.plan(staged.chunks.tensors.cut(size), inputs, size, decode=False, turn=staged.turn)
        return inputs

    def _next(self) -> Staged:
        if DEVICE != "cpu":
            torch.cuda.synchronize()  # the buffers of two passes ago are free
        self._turn += 1
        return self.staged[self._turn % len(self.staged)]


# -- Transformers as the judge


class Judgement(NamedTuple):
    """Of greedy tokens, position by position."""

    positions: int
    other: int  # not the reference's
    worst: float  # the largest part of its best logit that the reference had it in front of the token taken


def transformers_bf16(path: Path, device: str = DEVICE) -> Any:
    """The model's bf16 weights in float32 arithmetic: the definition, without a rounding of its own."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval().to(device)


@torch.inference_mode()
def logits_after(model: Any, ids: Sequence[int], prompt_len: int) -> torch.Tensor:
    """Transformers' logits for each token behind the prompt, float32[output, vocab]."""
    return model(torch.tensor([list(ids[:-1])], device=model.device)).logits[0, prompt_len - 1 :].float()


def judged(model: Any, answers: Sequence[tuple[Sequence[int], int]]) -> Judgement:
    """Each answer (all ids, length of the prompt) against the choice of Transformers after the same tokens."""
    positions, other, worst = 0, 0, 0.0
    for ids, prompt_len in answers:
        logits = logits_after(model, ids, prompt_len)
        taken = logits.gather(1, torch.tensor(list(ids[prompt_len:]), device=logits.device)[:, None])[:, 0]
        best = logits.amax(1)
        behind = (best - taken) / best.abs()
        positions += len(behind)
        other += int((taken < best).sum())
        worst = max(worst, float(behind.max()))
    return Judgement(positions, other, worst)
