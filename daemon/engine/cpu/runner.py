"""`Runner` that computes the model on the CPU."""

from __future__ import annotations

import os

# OpenMP reads this when torch loads it. Unlimited spinning between parallel loops has no measurable benefit on an
# idle machine. On a busy one it takes cores from the threads that it waits for: steps were up to 40 times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import numba
import numpy as np
import torch

from daemon.engine.cpu.attention import AttentionShape
from daemon.engine.cpu.batch import build_batch
from daemon.engine.cpu.linear import TILE, Arithmetic, choose_arithmetic
from daemon.engine.cpu.memory import ITEM_BYTES
from daemon.engine.cpu.model import Decoder
from daemon.engine.request import Request
from daemon.engine.runner import PoolSpec, Row, RunnerSettings, StepPlan, StepResult
from daemon.engine.sampling.sampler import Sampler
from daemon.engine.sampling.scorer import Scorer
from daemon.engine.weights import open_weights
from daemon.ipc.messages import RequestParams, SamplingParams
from daemon.models.model_config import ModelConfig, ModelError

_WARM_ROWS = 64  # oneDNN kernels are created in advance for decode batches up to this size


class CpuRunner:
    """Computes steps with `settings.threads` threads. The KV cache has the dtype of `arithmetic`.

    With `dtype` "auto" the constructor times bf16 against fp32; `deterministic` means fp32. Raises ModelError for
    settings that exclude each other.
    """

    def __init__(self, config: ModelConfig, settings: RunnerSettings) -> None:
        if settings.deterministic and settings.dtype == "bf16":
            raise ModelError("deterministic needs fp32: set dtype to auto or fp32, or deterministic to false")
        _set_threads(settings.threads)
        self.device = f"cpu, {settings.threads} threads"
        self.eos_token_ids = config.eos_token_ids
        self.max_model_len = min(settings.max_model_len, config.max_position)
        self.vocab_size = config.vocab_size
        self.arithmetic: Arithmetic = _choose_arithmetic(config, settings)
        self._config = config
        self._settings = settings
        self._shape = AttentionShape(
            config.num_heads, config.num_kv_heads, config.head_dim, settings.block_size, config.num_layers
        )
        self._sampler = Sampler(config.vocab_size, settings.threads, config.eos_token_ids)
        self._scorer = Scorer(config.vocab_size)

    def pool_spec(self, num_blocks: int) -> PoolSpec:
        name = "bfloat16" if self.arithmetic == "bf16" else "float32"
        _, kv_heads, head_dim, block_size, layers = self._shape
        return PoolSpec(num_blocks, layers, block_size, kv_heads, head_dim, name, ITEM_BYTES[self.arithmetic])

    def load(self, pool: memoryview) -> None:
        settings = self._settings
        flat = np.frombuffer(pool, np.uint16 if self.arithmetic == "bf16" else np.float32)
        with torch.inference_mode():
            self._model = Decoder(
                self._config,
                open_weights(self._config, settings.load_format),
                self._shape,
                flat,
                arithmetic=self.arithmetic,
                deterministic=settings.deterministic,
                threads=settings.threads,
                max_tokens=max(settings.max_batch_tokens, settings.max_num_seqs),
                max_len=self.max_model_len,
            )
            self._model.warm_up(TILE if settings.deterministic else min(settings.max_num_seqs, _WARM_ROWS))
        for plan in _warm_up_plans():
            self.execute(plan)
        self._sampler.warm_up()

    def execute(self, plan: StepPlan) -> StepResult:
        with torch.inference_mode():
            batch = build_batch(plan, self._shape, tiled=not self._settings.deterministic)
            scorer = self._scorer.step(plan.rows) if len(batch.scored) else None
            logits = self._model.logits(batch, scorer.add if scorer else None)
            requests = [row.request for row in plan.rows if row.sample]
            result = self._sampler.sample(logits, requests, plan.masks) if requests else StepResult([])
            return result._replace(prompt_logprobs=scorer.records()) if scorer else result


def _choose_arithmetic(config: ModelConfig, settings: RunnerSettings) -> Arithmetic:
    if settings.dtype == "auto" and not settings.deterministic:
        return choose_arithmetic(config)
    return "bf16" if settings.dtype == "bf16" else "fp32"


def _set_threads(threads: int) -> None:
    """Set the number of threads of torch and of the compiled kernels, for this process."""
    torch.set_num_threads(threads)
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]


def _warm_up_plans() -> list[StepPlan]:
    """Return a decode and a prefill chunk in the dummy block. They compile every kernel, or read it from the disk."""
    params = RequestParams(SamplingParams(max_tokens=1, seed=0), arrival=0.0)
    request = Request(rid=0, epoch=0, frontend=0, params=params, tokens=[0, 0, 0], prompt_len=3, block_table=[0])
    return [StepPlan([Row(request, 2, 1, True)], 1), StepPlan([Row(request, 0, 2, True)], 0)]
