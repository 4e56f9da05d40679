"""Prompts of a known length, all different, and the same for the same seed."""

from __future__ import annotations

from random import Random

# Short and common words: in most vocabularies each is one token.
_COMMON = (
    "time year people way day man thing woman life child world school state family student group country problem "
    "hand part place case week company system program question work government number night point home water room "
    "mother area money story fact month lot right study book eye job word business issue side kind head house "
    "service friend father power hour game line end member law car city community name president team minute idea "
    "kid body information back parent face others level office door health person art war history party result "
    "change morning reason research girl guy moment air teacher force education foot boy age policy music market "
    "sense nation plan college interest death experience effect use class control field development role effort "
    "rate heart drug show leader light voice wife whole police mind price report decision son view relationship "
    "town road arm difference value building action season society tax director position player record paper space "
    "ground form event official matter center couple site project activity star table need court oil situation "
    "cost industry figure street image phone data picture practice piece land product doctor wall worker news test "
    "movie north love step"
)
WORDS = _COMMON.split()


def word_prompts(count: int, words: int, *, seed: int, shared_words: int = 0) -> list[str]:
    """Return `count` prompts of `words` words each, after `shared_words` words that are the same for all.

    The own part of each starts with its number, so that no two prompts share more than the common words.
    """
    shared = " ".join(Random(f"{seed}").choices(WORDS, k=shared_words))
    prompts = []
    for i in range(count):
        own = Random(f"{seed} {i}").choices(WORDS, k=max(0, words - 1))
        prompts.append(" ".join([*([shared] if shared else []), str(i), *own]))
    return prompts


def token_prompts(
    count: int, tokens: int, *, seed: int, ids: tuple[int, int], shared_tokens: int = 0
) -> list[list[int]]:
    """As `word_prompts`, with token ids drawn uniformly from ids[0] <= id < ids[1]."""
    shared = Random(f"{seed}").choices(range(*ids), k=shared_tokens)
    return [shared + Random(f"{seed} {i}").choices(range(*ids), k=tokens) for i in range(count)]


def arrival_times(count: int, rate: float, *, arrivals: str, cv: float, seed: int) -> list[float]:
    """Return the arrival times of `count` requests, seconds from the start, on average `rate` a second.

    `arrivals` is ``poisson``, or ``gamma``: gaps with the coefficient of variation `cv` (1 is Poisson, more is
    burstier). The first request arrives at 0.
    """
    shape = 1.0 if arrivals == "poisson" else 1.0 / cv**2
    random = Random(f"{seed} arrivals")
    times, now = [], 0.0
    for _ in range(count):
        times.append(now)
        now += random.gammavariate(shape, 1.0 / (rate * shape))
    return times
