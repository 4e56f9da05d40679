"""The model on the CPU, as a `Runner`."""

from __future__ import annotations

import os

# Read by OpenMP when torch loads it. Unlimited spinning between parallel loops wins nothing measurable on an idle
# box, and on a busy one keeps the very threads waited for off their cores: steps were up to 40 times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import numba
import numpy as np
import torch

from daemon.engine.cpu.attention import AttentionShape
from daemon.engine.cpu.batch import build_batch
from daemon.engine.cpu.linear import TILE, Arithmetic, choose_arithmetic
from daemon.engine.cpu.memory import ITEM_BYTES
from daemon.engine.cpu.model import Llama
from daemon.engine.request import Request
from daemon.engine.runner import PoolSpec, Row, StepPlan, StepResult
from daemon.engine.sampling.sampler import Sampler
from daemon.engine.weights import open_weights
from daemon.ipc.messages import RequestParams, SamplingParams
from daemon.models.model_config import ModelConfig, ModelError

_WARM_ROWS = 64  # decode batches up to this size find oneDNN's kernels ready


class CpuRunner:
    """Computes steps with `threads` threads. KV is kept in the arithmetic's dtype.

    `dtype` "auto" times bf16 against fp32 on construction; `deterministic` means fp32. Raises ModelError for
    settings that exclude each other.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        *,
        threads: int,
        dtype: str,
        deterministic: bool,
        load_format: str,
        block_size: int,
        max_num_seqs: int,
        max_batch_tokens: int,
        max_model_len: int,
    ) -> None:
        if deterministic and dtype == "bf16":
            raise ModelError("deterministic needs fp32: set dtype to auto or fp32, or deterministic to false")
        _set_threads(threads)
        self.device = f"cpu, {threads} threads"
        self.eos_token_ids = model_config.eos_token_ids
        self.max_model_len = min(max_model_len, model_config.max_position)
        self.vocab_size = model_config.vocab_size
        self.arithmetic: Arithmetic = "fp32" if deterministic else _arithmetic(model_config, dtype)
        self._card = model_config
        self._threads = threads
        self._deterministic = deterministic
        self._load_format = load_format
        self._max_num_seqs = max_num_seqs
        self._max_batch_tokens = max_batch_tokens
        self._shape = AttentionShape(
            model_config.num_heads,
            model_config.num_kv_heads,
            model_config.head_dim,
            block_size,
            model_config.num_layers,
        )
        self._sampler = Sampler(model_config.vocab_size, threads, model_config.eos_token_ids)

    def pool_spec(self, num_blocks: int) -> PoolSpec:
        name = "bfloat16" if self.arithmetic == "bf16" else "float32"
        _, kv_heads, head_dim, block_size, layers = self._shape
        return PoolSpec(num_blocks, layers, block_size, kv_heads, head_dim, name, ITEM_BYTES[self.arithmetic])

    def load(self, pool: memoryview) -> None:
        flat = np.frombuffer(pool, np.uint16 if self.arithmetic == "bf16" else np.float32)
        with torch.inference_mode():
            self._model = Llama(
                self._card,
                open_weights(self._card, self._load_format),
                self._shape,
                flat,
                arithmetic=self.arithmetic,
                deterministic=self._deterministic,
                threads=self._threads,
                max_tokens=max(self._max_batch_tokens, self._max_num_seqs),
                max_len=self.max_model_len,
            )
            self._model.warm_up(TILE if self._deterministic else min(self._max_num_seqs, _WARM_ROWS))
        for plan in _warm_up_plans():
            self.execute(plan)
        self._sampler.warm_up()

    def execute(self, plan: StepPlan) -> StepResult:
        with torch.inference_mode():
            batch = build_batch(plan, self._shape, tiled=not self._deterministic)
            logits = self._model.logits(batch)
            requests = [row.request for row in plan.rows if row.sample]
            return self._sampler.sample(logits, requests) if requests else StepResult([])


def _arithmetic(model_config: ModelConfig, dtype: str) -> Arithmetic:
    if dtype == "auto":
        return choose_arithmetic(model_config)
    return "bf16" if dtype == "bf16" else "fp32"


def _set_threads(threads: int) -> None:
    """Of this process: torch's and the compiled kernels'."""
    torch.set_num_threads(threads)
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]


def _warm_up_plans() -> list[StepPlan]:
    """A decode and a chunk in the dummy block: every kernel is compiled, or read from the disk, by these."""
    params = RequestParams(SamplingParams(max_tokens=1, seed=0), arrival=0.0)
    request = Request(rid=0, epoch=0, frontend=0, params=params, tokens=[0, 0, 0], prompt_len=3, block_table=[0])
    return [StepPlan([Row(request, 2, 1, True)], 1), StepPlan([Row(request, 0, 2, True)], 0)]
