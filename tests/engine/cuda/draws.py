"""Rows of logits with sampling parameters, and the CPU's sampler as the reference for device samplers."""

import numpy as np
import torch
from hypothesis import strategies as st

from daemon.engine.cuda.sampler import SamplingTensors
from daemon.engine.request import Request
from daemon.engine.sampling.sampler import Sampler, inverse_temperature, min_p_depth
from daemon.ipc.messages import RequestParams, SamplingParams

KINDS = ["flat", "wide", "peaked", "steps", "equal", "holes", "impossible", "infinite", "zeros", "huge", "tiny"]


def make_logits(kind, size, rng):
    """Return logits of a kind, float32[size]."""
    logits = rng.normal(size=size).astype(np.float32) * np.float32(0.3 if kind == "flat" else 4)
    some = rng.random(size)
    if kind == "peaked":
        logits[rng.integers(0, size, 5)] += 18
    elif kind == "steps":
        logits = np.round(logits)
    elif kind == "equal":
        logits[:] = -1.5
    elif kind == "holes":
        logits[some < 0.5] = -np.inf
        logits[some < 0.1] = np.nan
        logits[some > 0.98] = -np.nan
    elif kind == "impossible":
        logits = np.where(some < 0.5, np.float32(np.nan), np.float32(-np.inf))
    elif kind == "infinite":
        logits[some < 0.02] = np.inf
        logits[some > 0.99] = np.finfo(np.float32).max
    elif kind == "zeros":
        logits = np.where(some < 0.5, np.float32(0.0), np.float32(-0.0))
    elif kind == "huge":
        logits = np.clip(logits, -4, 4) * np.float32(8e37)
    elif kind == "tiny":
        logits = logits * np.float32(1e-45)
    return logits


@st.composite
def samplings(draw):
    return SamplingParams(
        max_tokens=1,
        seed=draw(st.integers(-(2**63), 2**64 - 1)),
        temperature=draw(st.sampled_from([0.0, 1e-6, 1e-5, 0.01, 0.3, 0.7, 1.0, 2.0, 100.0])),
        top_k=draw(st.sampled_from([0, 0, 1, 2, 7, 40, 900, 10**6])),
        top_p=draw(st.sampled_from([1.0, 1.0, 0.0, 1e-9, 0.1, 0.5, 0.9, 0.99, 0.9999999, 1 - 2**-53])),
        min_p=draw(st.sampled_from([0.0, 0.0, 1e-30, 1e-4, 0.1, 0.9, 1.0])),
    )


def request(sampling, position):
    return Request(0, 0, 0, RequestParams(sampling, 0.0), [0] * position, position)


def cpu_tokens(logits, samplings, positions):
    """Return the tokens of the CPU's sampler, for logits float32[rows, vocab]."""
    requests = [request(*pair) for pair in zip(samplings, positions, strict=True)]
    return Sampler(logits.shape[1]).sample(torch.from_numpy(logits), requests).tokens


def params_of(samplings, positions, device="cpu"):
    seeds = np.array([p.seed & (2**64 - 1) for p in samplings], np.uint64)
    columns = [
        np.array([inverse_temperature(p) for p in samplings], np.float32),
        np.array([min_p_depth(p) for p in samplings], np.float32),
        np.array([p.top_k for p in samplings], np.int32),
        np.array([p.top_p for p in samplings], np.float64),
        seeds.view(np.int64),
        np.array(positions, np.int32),
    ]
    return SamplingTensors(*(torch.from_numpy(column).to(device) for column in columns))


def many_rows(vocab, rng, rows):
    """Return rows with logits of all kinds and parameters of all kinds: (logits, samplings, positions)."""
    logits = np.stack([make_logits(KINDS[i % len(KINDS)], vocab, rng) for i in range(rows)])
    sampling = [
        SamplingParams(
            max_tokens=1,
            seed=int(rng.integers(2**63)),
            temperature=float(rng.choice([0.0, 0.3, 1.0, 1.0, 2.0])),
            top_k=int(rng.choice([0, 0, 1, 20, 500, 5000])),
            top_p=float(rng.choice([1.0, 1.0, 0.3, 0.9, 0.999])),
            min_p=float(rng.choice([0.0, 0.0, 1e-6, 0.05])),
        )
        for _ in range(rows)
    ]
    return logits, sampling, rng.integers(1, 50, rows).tolist()
