"""Masks of grammars for the engines without a model."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from daemon.engine.request import Request
from daemon.engine.runner import NO_TOKEN, TokenMasks


def allowed_tokens(request: Request, masks: TokenMasks | None) -> NDArray[np.int64] | int:
    """Return the ids, ascending, that a request with a grammar may sample; or what stands for its token."""
    mask = NO_TOKEN if masks is None else masks.of(request)
    return mask if isinstance(mask, int) else token_ids(mask)


def token_ids(mask: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return the ids of the tokens of a mask, ascending."""
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
