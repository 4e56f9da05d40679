"""Sampling on the device: exactly the tokens that `engine.sampling.sampler` samples on the CPU from the same logits.

`KernelSampler` launches one kernel (sampler.cu: the threads on a GPU; row.h: how a team of threads samples a row;
draw.h: the arithmetic). The kernel reads a row's logits once from global memory and keeps them in the shared memory
of a thread block cluster. Maximum, cutoff and sampling are passes over them there. A cutoff takes three passes for
top-k and three for top-p, each with two cluster barriers, and up to three more passes if equal logits are at its
edge. No speed has been measured yet. `TorchSampler` does the same with torch operations, on any device, slowly and
with much memory.

Both sample plain rows only. Rows with penalties, bias, min_tokens or logprobs need their request's tokens, and the
CPU's sampler samples them.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import numpy as np
import torch

from daemon.engine.cuda import kernels
from daemon.engine.cuda.arrays import SlotSampling
from daemon.engine.runner import NO_TOKEN
from daemon.engine.sampling.sampler import inverse_temperature, min_p_depth
from daemon.ipc.messages import SamplingParams

_WORD = 0xFFFFFFFF
_MUL0, _MUL1 = 0xD2511F53, 0xCD9E8D57
_WEYL0, _WEYL1 = 0x9E3779B9, 0xBB67AE85
_LN2 = 0.6931471805599453
_SQRT_HALF = 0.7071067811865476
_MAX_FLOAT = float(np.finfo(np.float32).max)
_NEG_INF_ORDER = -2139095041
_POS_INF_ORDER = 0x7F800000
_SIGNLESS = 0x7FFFFFFF
# Each is a float32 number, as torch rounds it in an operation on float32.
_LOG2E = float(np.float32(1.44269504))
_LN2_HIGH = 0.693359375
_LN2_LOW = float(np.float32(-2.12194440e-4))
_EXP_TERMS = [float(np.float32(1.0 / math.factorial(n))) for n in range(7, -1, -1)]
_LEAST = -44.0
_SEED_MASK = (1 << 64) - 1
_LARGEST_INT32 = (1 << 31) - 1
_CHUNK = 1 << 22  # logits that TorchSampler processes at a time: some hundred MB


class SamplingTensors(NamedTuple):
    """Sampling parameters, one entry per row. All tensors are on the device of the logits."""

    inverse_temperature: torch.Tensor  # float32[rows]; 0: greedy
    min_p_depth: torch.Tensor  # float32[rows], temperature * log(min_p); -inf: no min_p
    top_k: torch.Tensor  # int32[rows]; 0, or at least the vocabulary size: all tokens
    top_p: torch.Tensor  # float64[rows]; 1: all tokens
    seed: torch.Tensor  # int64[rows], the bits of an unsigned number
    position: torch.Tensor  # int32[rows], index of the new token in its sequence, prompt included

    def rows(self, start: int, stop: int) -> SamplingTensors:
        """Return views of rows [start, stop)."""
        return SamplingTensors(*(tensor[start:stop] for tensor in self))


_DTYPES = (torch.float32, torch.float32, torch.int32, torch.float64, torch.int64, torch.int32)


class DeviceSampler(Protocol):
    """Samples on a device. It can be captured in a CUDA graph."""

    def sample(self, logits: torch.Tensor, params: SamplingTensors, out: torch.Tensor | None = None) -> torch.Tensor:
        """Sample a token for each row of `logits` (float32[rows, vocab]) into `out` (int32[rows]), and return `out`.

        Without `out` the result is in the sampler's own memory, until the next such call. A row without a logit above
        -inf gives NO_TOKEN. Does not wait for the device. Raises ValueError if shapes or dtypes do not fit.
        """
        ...


class KernelSampler:
    """Sampling by our own kernel, which must be built and in use (`kernels.use`).

    Allocates nothing after construction. Not thread-safe.
    """

    def __init__(self, max_rows: int, vocab_size: int, device: torch.device | str) -> None:
        """Raises KernelError if the kernel is not built."""
        self._vocab_size = vocab_size
        self._out = torch.full((max_rows,), NO_TOKEN, dtype=torch.int32, device=device)
        self._kernel = kernels.load_sampler().draw

    def sample(self, logits: torch.Tensor, params: SamplingTensors, out: torch.Tensor | None = None) -> torch.Tensor:
        """See `DeviceSampler`."""
        out = _checked(logits, params, self._out if out is None else out, self._vocab_size)
        self._kernel(logits, *params, out)
        return out


class TorchSampler:
    """Sampling by torch operations, which allocate memory."""

    def __init__(self, max_rows: int, vocab_size: int, device: torch.device | str) -> None:
        self._vocab_size = vocab_size
        self._out = torch.full((max_rows,), NO_TOKEN, dtype=torch.int32, device=device)

    def sample(self, logits: torch.Tensor, params: SamplingTensors, out: torch.Tensor | None = None) -> torch.Tensor:
        """See `DeviceSampler`."""
        out = _checked(logits, params, self._out if out is None else out, self._vocab_size)
        step = max(1, _CHUNK // self._vocab_size)
        for start in range(0, len(logits), step):
            stop = min(start + step, len(logits))
            out[start:stop] = _sample(logits[start:stop], params.rows(start, stop))
        return out


def _checked(logits: torch.Tensor, params: SamplingTensors, out: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Check the arguments, and return the part of `out` that the rows of `logits` fill."""
    rows = len(logits)
    if out.dtype != torch.int32:
        raise ValueError(f"tokens are int32, not {out.dtype}")
    if logits.dtype != torch.float32 or logits.dim() != 2 or logits.shape[1] != vocab_size or len(out) < rows:
        raise ValueError(
            f"logits are {logits.dtype}{list(logits.shape)}, but must be float32 with a vocabulary of {vocab_size} "
            f"and at most {len(out)} rows"
        )
    for name, tensor, dtype in zip(SamplingTensors._fields, params, _DTYPES, strict=True):
        if tensor.dtype != dtype or tensor.shape != (rows,):
            raise ValueError(f"{name} is {tensor.dtype}{list(tensor.shape)}, but must be {dtype}[{rows}]")
    return out[:rows]


# -- The definitions of `noise` and `filters`, in torch. Each operation rounds its result; the host reads no value.


def _sample(logits: torch.Tensor, params: SamplingTensors) -> torch.Tensor:
    order = _orders(logits)
    ranked = order.sort(dim=1, descending=True, stable=True)  # equal logits in order of their ids
    best = ranked.indices[:, 0]
    possible = ranked.values[:, 0] > _NEG_INF_ORDER
    largest = logits.gather(1, best[:, None]).clamp(max=_MAX_FLOAT)
    largest = torch.where(possible[:, None], largest, 0.0)
    scaled = (logits.clamp(max=_MAX_FLOAT) - largest) * params.inverse_temperature[:, None]
    kept = _kept(ranked, largest, scaled, params)
    scores = scaled + _gumbel(_words(params, logits.shape[1]))
    sampled = _lowest_of_largest(_orders(torch.where(kept, scores, -torch.inf)))
    sampled = torch.where(params.inverse_temperature == 0, best, sampled)
    return torch.where(possible, sampled, NO_TOKEN).to(torch.int32)


def _orders(values: torch.Tensor) -> torch.Tensor:
    """Return int64 that sort like the float32 `values`. -0.0 counts as 0.0, NaN as -inf."""
    bits = (values + 0.0).contiguous().view(torch.int32).long()  # -0.0 + 0.0 is 0.0
    order = bits ^ ((bits >> 31) & _SIGNLESS)
    return torch.where((order > _POS_INF_ORDER) | (order < _NEG_INF_ORDER), _NEG_INF_ORDER, order)


def _lowest_of_largest(order: torch.Tensor) -> torch.Tensor:
    """Return the lowest id of the largest entry of each row, int64[rows]. argmax does not promise the lowest one."""
    ids = torch.arange(order.shape[1], device=order.device)
    return torch.where(order == order.amax(1, keepdim=True), ids, order.shape[1]).amin(1)


def _kept(
    ranked: torch.return_types.sort, largest: torch.Tensor, scaled: torch.Tensor, params: SamplingTensors
) -> torch.Tensor:
    """Return which tokens may be sampled, bool[rows, vocab]: a prefix of the ranked tokens."""
    vocab = scaled.shape[1]
    least = _orders((largest + params.min_p_depth[:, None]).clamp(min=-_MAX_FLOAT))
    count = (ranked.values >= least).sum(1, keepdim=True)
    top_k = params.top_k.long()[:, None]
    count = torch.where((top_k > 0) & (top_k < vocab), count.minimum(top_k), count)
    rank = torch.arange(vocab, device=scaled.device)
    weights = torch.where(rank < count, _weights(scaled).gather(1, ranked.indices), 0).cumsum(1)
    top_p = params.top_p[:, None]
    share = (weights[:, -1:].double() * top_p).ceil().long()
    target = share.minimum(weights[:, -1:]).clamp(min=1)
    nucleus = (weights < target).sum(1, keepdim=True) + 1
    count = torch.where(top_p < 1.0, nucleus, count)
    return torch.empty_like(scaled, dtype=torch.bool).scatter_(1, ranked.indices, rank < count)


def _weights(scaled: torch.Tensor) -> torch.Tensor:
    """Return exp of float32 `scaled` (at most 0) in units of 2^-40, int64. The weight of NaN is 0."""
    x = torch.where(scaled > _LEAST, scaled, _LEAST)
    n = (x * _LOG2E - 0.5).int()
    k = n.float()
    r = (x - k * _LN2_HIGH) - k * _LN2_LOW
    p = torch.full_like(r, _EXP_TERMS[0])
    for term in _EXP_TERMS[1:]:
        p = p * r
        p = p + term
    return ((p * 2.0**24).int().long() << 16) >> (-n).long()


def _words(params: SamplingTensors, vocab: int) -> torch.Tensor:
    """Return the Philox word of each token, int64[rows, vocab].

    Products wrap at 64 bits; the bits used are correct.
    """
    groups = torch.arange(-(-vocab // 4), device=params.seed.device)[None]
    c0, c1 = params.position.long()[:, None], groups
    c2, c3 = torch.zeros_like(groups), torch.zeros_like(groups)
    k0, k1 = params.seed[:, None] & _WORD, (params.seed[:, None] >> 32) & _WORD
    for _ in range(10):
        p0, p1 = c0 * _MUL0, c2 * _MUL1
        c0, c1 = ((p1 >> 32) & _WORD) ^ c1 ^ k0, p1 & _WORD
        c2, c3 = ((p0 >> 32) & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _WEYL0) & _WORD, (k1 + _WEYL1) & _WORD
    return torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), dim=-1).flatten(1)[:, :vocab]


def _log(x: torch.Tensor) -> torch.Tensor:
    """Return the log of positive normal float64, exactly as `noise` defines it."""
    bits = x.view(torch.int64)
    e = (bits >> 52) - 1022
    f = ((bits & 0x000FFFFFFFFFFFFF) | 0x3FE0000000000000).view(torch.float64)
    low = f < _SQRT_HALF
    f, e = torch.where(low, f * 2.0, f), torch.where(low, e - 1, e)
    s = (f - 1.0) / (f + 1.0)
    z = s * s
    t = torch.full_like(z, 1.0 / 21.0)
    for k in range(9, -1, -1):
        t = t * z
        t = t + 1.0 / (2 * k + 1)
    return e.double() * _LN2 + (2.0 * s) * t


def _gumbel(words: torch.Tensor) -> torch.Tensor:
    """Return the Gumbel noise of each word (int64), float32."""
    v = (words.double() + 0.5) * 2.0**-32
    return (-_log(-_log(1.0 - v))).float()


def slot_sampling(sampling: SamplingParams) -> SlotSampling:
    """Return the parameters of a request in the types of the kernel."""
    seed = sampling.seed & _SEED_MASK
    return SlotSampling(
        inverse_temperature=inverse_temperature(sampling),
        min_p_depth=min_p_depth(sampling),
        top_k=min(sampling.top_k, _LARGEST_INT32),
        top_p=sampling.top_p,
        seed=seed - (seed >> 63 << 64),
    )
