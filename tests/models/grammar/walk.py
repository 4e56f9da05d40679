"""Random answers that follow a grammar, as a model with equal logits would write them."""

from __future__ import annotations

import random

import numpy as np

from daemon.models.grammar.source import GrammarSource, to_llguidance
from daemon.models.grammar.vocabulary import Vocabulary


def random_answer(
    vocabulary: Vocabulary, source: GrammarSource, seed: int, ends: set[int], most: int = 400
) -> list[int]:
    """Return random tokens that the grammar allows; the last is one of `ends` unless there are `most`."""
    rng, matcher, tokens = random.Random(seed), vocabulary.compile(to_llguidance(source)), []
    while len(tokens) < most:
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        allowed = np.flatnonzero(np.unpackbits(mask, bitorder="little")).tolist()
        assert not matcher.is_error(), matcher.get_error()
        # Ends are rare among hundreds of tokens, so take one where it is possible.
        token = min(ends & set(allowed)) if ends & set(allowed) else rng.choice(allowed)
        tokens.append(token)
        if token in ends:
            return tokens
        assert matcher.consume_token(token)
    return tokens
