"""The logprobs of prompts' tokens, computed on the device by torch. `sampling.scorer` does the same on the CPU.

The result goes to the host as one copy at the end of the pass. Everything is allocated for one pass: few requests ask
for this.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from daemon.engine import prompt_scores
from daemon.engine.prompt_scores import Scores
from daemon.engine.runner import Row
from daemon.engine.sampling.sampler import MIN_LOGPROB
from daemon.ipc.prompt_logprobs import NO_ID

_MAX_FLOAT = float(np.finfo(np.float32).max)


class PassScores:
    """The scores of one pass. Construct and fill it in the work of the stream that computes the pass."""

    def __init__(self, rows: Sequence[Row], first: int, vocab_size: int, device: torch.device) -> None:
        """`rows`: the chunks of the pass, of which some are scored. `first`: index of their first token in it."""
        self._vocab_size = vocab_size
        self._device = device
        self.indices = self._to_device(prompt_scores.indices(rows) + first)  # int64[positions] in the pass
        self.step = prompt_scores.slice_rows(vocab_size)  # positions whose logits are computed at a time
        targets = prompt_scores.targets(rows)
        self._targets = self._to_device(np.where((targets >= 0) & (targets < vocab_size), targets, -1))
        self._top = prompt_scores.num_alternatives(rows)
        count = len(targets)
        # One block, so that one copy moves it: logprobs, ranks, then ids and logprobs of the alternatives.
        self._found = torch.empty(count, 2 + 2 * self._top, dtype=torch.float64, device=device)
        self._host: torch.Tensor

    def _to_device(self, values: np.ndarray) -> torch.Tensor:
        host = torch.from_numpy(values)
        return host.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else host

    def add(self, first: int, logits: torch.Tensor) -> None:
        """Score the positions from index `first` on by `logits` (float32[positions, vocab]), and change these."""
        logits.clamp_(max=_MAX_FLOAT)
        targets = self._targets[first : first + len(logits), None]
        chosen = logits.gather(1, targets.clamp(min=0)).masked_fill_(targets < 0, -torch.inf)
        total = logits.logsumexp(1, keepdim=True)
        found, most = self._found[first : first + len(logits)], min(self._top, self._vocab_size)
        found[:, 0:1] = chosen - total
        found[:, 1] = (logits >= chosen).sum(1)
        values, ids = logits.topk(most, dim=1)
        found[:, 2 : 2 + most] = ids.masked_fill_(values == -torch.inf, NO_ID)
        found[:, 2 + most : 2 + self._top] = NO_ID
        found[:, 2 + self._top : 2 + self._top + most] = values - total

    def fetch(self) -> None:
        """Copy the scores to the host, when all positions are scored."""
        self._host = torch.empty_like(self._found, device="cpu", pin_memory=self._device.type == "cuda")
        self._host.copy_(self._found, non_blocking=True)

    def on_host(self) -> Scores:
        """Return the scores. Call it once the device has done the copy of `fetch`."""
        found, top = self._host.numpy(), self._top
        return Scores(
            _logprobs(found[:, 0]),
            np.maximum(1, found[:, 1]).astype(np.uint32),
            found[:, 2 : 2 + top].astype(np.uint32),
            _logprobs(found[:, 2 + top :]),
        )


def _logprobs(values: np.ndarray) -> np.ndarray:
    """Return logprobs in [MIN_LOGPROB, 0], float32."""
    return np.clip(np.where(np.isfinite(values), values, MIN_LOGPROB), MIN_LOGPROB, 0.0).astype(np.float32)
