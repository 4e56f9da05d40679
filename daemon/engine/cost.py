"""What a step costs: a linear model of its time, fitted to steps that were timed. Pure.

    t(step) = base + per_token * tokens computed + per_kv * tokens of KV read

The ideal time is that of a step with one token and no KV: the model's weights are read once and hardly used.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import NamedTuple

KNEE = 2.0  # times the ideal at which a step's tokens are at the knee
NEAR_IDEAL = 1.2
"""Times the ideal that still counts as nearly ideal. That headroom is set by "the load at which a decode step is
still near its best" is Llumnix's (section 6.4); the factor is ours."""

_NOTICEABLE = 0.05  # share of the ideal time below which a term, at its largest, is noise
_SINGULAR = 1e-9
_DIGITS = 9  # of a squared relative error: what differs after them is rounding


class Observation(NamedTuple):
    """One timed step."""

    tokens: int  # computed
    kv: int  # tokens of KV read, summed over the rows
    seconds: float


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds; all zero where nothing was measured."""

    base: float = 0.0
    per_token: float = 0.0
    per_kv: float = 0.0
    at_scale: float = field(default=0.0, compare=False)
    """Seconds a token, beyond `base`, in the largest step timed: on a GPU, where small steps wait for the weights
    alone, it is more than `per_token`, which is to fit them all."""

    def seconds(self, tokens: int, kv: int) -> float:
        """Time of a step that computes `tokens` and reads `kv` tokens of KV."""
        return self.base + self.per_token * tokens + self.per_kv * kv

    @property
    def ideal(self) -> float:
        """Seconds of the smallest step."""
        return self.base + self.per_token

    def tokens_within(self, seconds: float) -> int:
        """Most tokens that a step computes in `seconds`, KV aside, but one at least; 0: no limit was found."""
        each = max(self.per_token, self.at_scale)
        return max(1, int((seconds - self.base) / each)) if each else 0

    @property
    def knee(self) -> int:
        """Tokens in a step at which it takes twice its ideal time; 0: no limit was found."""
        return int((KNEE * self.ideal - self.base) / self.per_token) if self.per_token else 0

    @property
    def ideal_tokens(self) -> int:
        """Tokens of KV up to which a step that decodes takes at most 1.2 times its ideal; 0: no limit was found."""
        return max(1, int((NEAR_IDEAL - 1.0) * self.ideal / self.per_kv)) if self.per_kv else 0


def fit(observations: Iterable[Observation]) -> StepCost:
    """The model with the least squares of relative errors and no negative coefficient.

    Of steps alike the fastest counts: what delays a step is not the step's. A term that stays below a twentieth
    of the ideal time, however large the steps were, is taken for noise. All zero without observations.
    """
    fastest: dict[tuple[int, int], float] = {}
    for tokens, kv, seconds in observations:
        fastest[tokens, kv] = min(seconds, fastest.get((tokens, kv), seconds))
    seen = [Observation(tokens, kv, seconds) for (tokens, kv), seconds in sorted(fastest.items()) if seconds > 0]
    if not seen:
        return StepCost()
    cost = _least_squares(seen, (0, 1, 2))
    shows = [1]
    shows += [2] if cost.per_kv * max(o.kv for o in seen) >= _NOTICEABLE * cost.ideal else []
    shows = shows if cost.per_token * max(o.tokens for o in seen) >= _NOTICEABLE * cost.ideal else shows[1:]
    cost = _least_squares(seen, (0, *shows))
    return replace(cost, at_scale=_at_scale(cost, seen[-1])) if cost.per_token else cost


def _at_scale(cost: StepCost, largest: Observation) -> float:
    tokens, kv, seconds = largest
    return max(0.0, seconds - cost.base - cost.per_kv * kv) / tokens


def _least_squares(seen: Sequence[Observation], terms: tuple[int, ...]) -> StepCost:
    """Non-negative least squares over some of the three terms: of all subsets the best that can be solved, of two
    as good the first. `base` alone always can."""
    rows = [(1.0 / o.seconds, o.tokens / o.seconds, o.kv / o.seconds) for o in seen]
    found = []
    for size in range(1, len(terms) + 1):
        for chosen in combinations(terms, size):
            solution = _solve(rows, chosen)
            if solution is not None and min(solution) >= 0.0 and solution[0] + solution[1] > 0.0:
                error = sum((sum(c * x for c, x in zip(solution, row, strict=True)) - 1.0) ** 2 for row in rows)
                found.append((round(error, _DIGITS), solution))
    return StepCost(*min(found, key=lambda pair: pair[0])[1])


def _solve(rows: Sequence[tuple[float, ...]], chosen: tuple[int, ...]) -> tuple[float, ...] | None:
    """Coefficients, 0 where not `chosen`, with which the rows come nearest to 1; None if they do not tell."""
    scale = [max(row[i] for row in rows) or 1.0 for i in chosen]
    columns = [[row[i] / s for row in rows] for i, s in zip(chosen, scale, strict=True)]
    matrix = [[_dot(a, b) for b in columns] + [sum(a)] for a in columns]
    solution = _eliminate(matrix)
    if solution is None:
        return None
    by_term = dict(zip(chosen, (x / s for x, s in zip(solution, scale, strict=True)), strict=True))
    return tuple(by_term.get(i, 0.0) for i in range(3))


def _eliminate(matrix: list[list[float]]) -> list[float] | None:
    """Gauss-Jordan on n rows of n + 1; without pivoting, as the matrix of normal equations is positive."""
    for i, row in enumerate(matrix):
        if row[i] < _SINGULAR:
            return None
        row[:] = [x / row[i] for x in row]
        for j, other in enumerate(matrix):
            if j != i:
                other[:] = [x - other[i] * y for x, y in zip(other, row, strict=True)]
    return [row[-1] for row in matrix]


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))
