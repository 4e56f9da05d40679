"""Kernels that compute the words and the noise of many tokens, by the functions of `noise`."""

from __future__ import annotations

import numpy as np

from daemon.engine.jit import kernel
from daemon.engine.sampling.noise import gumbel, philox


@kernel()
def token_words(seed: int, position: int, stream: int, tokens: np.ndarray, out: np.ndarray) -> None:
    """Write the word of each of `tokens` (int32[n], not negative) to `out` (uint32[n]). `seed`: np.uint64."""
    for i in range(len(tokens)):
        token = np.uint64(tokens[i])
        lanes = philox(np.uint64(position), token >> np.uint64(2), np.uint64(stream), np.uint64(0), seed)
        out[i] = lanes[token & np.uint64(3)]


@kernel()
def gumbel_noise(words: np.ndarray, out: np.ndarray) -> None:
    """Write the noise of each word (uint32[n]) to `out` (float32[n])."""
    for i in range(len(words)):
        out[i] = gumbel(words[i])
