"""The cost of a step: a linear model of its time, fitted to measured steps. Pure.

    t(step) = base + per_token * tokens computed + per_kv * tokens of KV read

The ideal time is that of a step with one token and no KV: it reads the model's weights once and uses them least.

Policies use two limits of this cost (`StepLimits`). What an engine measures is noisy if other work runs beside it,
and two equal engines with different limits would get unequal load for as long as they live. So equal engines publish
their measured times, and each fits the model to the fastest times of all of them. A time that no second run confirms
is not used; without enough others there are no limits, and policies use their own.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import NamedTuple

from daemon.ipc.messages import EngineFacts

KNEE = 2.0  # times the ideal time: a step that takes this long has reached the knee
NEAR_IDEAL = 1.2
"""Times the ideal time that still count as nearly ideal. The rule that "the load at which a decode step is still near
its best" sets the headroom is from Llumnix (section 6.4); the factor is ours."""

INDISPENSABLE = 3  # steps: the minimum that separates the three terms of the cost
_CONFIRMS = 1.4  # times the fastest run that a second run may take to confirm it
_NOTICEABLE = 0.05  # share of the ideal time below which a term, at its largest, is noise
_SINGULAR = 1e-9
_DIGITS = 9  # of a squared relative error: a difference beyond them is rounding


class Observation(NamedTuple):
    """One measured step."""

    tokens: int  # computed
    kv: int  # tokens of KV read, summed over the rows
    seconds: float


class StepTime(NamedTuple):
    """The two fastest runs of one measured step, in seconds."""

    tokens: int  # computed
    kv: int  # tokens of KV read, summed over the rows
    fastest: float
    second: float = math.inf

    @property
    def confirmed(self) -> bool:
        """True if a second run took about as long: it is unlikely that other work delayed both equally."""
        return self.second <= _CONFIRMS * self.fastest

    def run(self, seconds: float) -> StepTime:
        """Return the times after one more run."""
        fastest, second, _ = sorted((self.fastest, self.second, seconds))
        return self._replace(fastest=fastest, second=second)


class StepLimits(NamedTuple):
    """The fields of the same name in `EngineFacts`; 0: no limit."""

    knee: int = 0
    ideal_tokens: int = 0


_STEP_TIME = struct.Struct("<IIff")


def pack_times(times: Iterable[StepTime]) -> bytes:
    """Return the times as `EngineFacts.step_times`."""
    return b"".join(_STEP_TIME.pack(*time) for time in times)


def unpack_times(packed: bytes) -> list[StepTime]:
    """Return the times of `EngineFacts.step_times`."""
    return [StepTime(*fields) for fields in _STEP_TIME.iter_unpack(packed)]


def merge_times(times: Iterable[StepTime]) -> list[StepTime]:
    """Return one entry for each step, by size, with its two fastest runs on any of the engines."""
    merged: dict[tuple[int, int], StepTime] = {}
    for time in times:
        size = time.tokens, time.kv
        merged[size] = merged[size].run(time.fastest).run(time.second) if size in merged else time
    return [merged[size] for size in sorted(merged)]


class SharedCost:
    """The limits that equal engines compute from the times of all of them; the fit is kept until a time changes."""

    def __init__(self, cost_group: str, own: Iterable[StepTime], ideal_tokens: int = 0) -> None:
        """`own`: measured on this engine; none: it has no limits. `ideal_tokens`: of the operator; 0: measured."""
        self._cost_group = cost_group
        self._ideal_tokens = ideal_tokens
        self._key: tuple[bytes, ...] = (b"",)  # no times
        self.packed = pack_times(own)
        self.limits = StepLimits(0, ideal_tokens)
        self.trusted = True  # False: too few times are confirmed, so there are no limits

    def update(self, others: Iterable[EngineFacts]) -> bool:
        """Take the times that the `others` publish; those of another group do not count. Return True if a time has
        changed since the last call."""
        group = [self.packed, *(f.step_times for f in others if f.cost_group == self._cost_group)]
        key = tuple(sorted(set(group)))
        if key == self._key:
            return False
        self._key = key
        times = merge_times(time for packed in key for time in unpack_times(packed))
        confirmed = [time for time in times if time.confirmed]
        self.trusted = len(confirmed) >= min(INDISPENSABLE, len(times))
        cost = fit_times(confirmed) if self.trusted else StepCost()
        self.limits = StepLimits(cost.knee, self._ideal_tokens or cost.ideal_tokens)
        return True


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds; all zero if nothing was measured."""

    base: float = 0.0
    per_token: float = 0.0
    per_kv: float = 0.0
    at_scale: float = field(default=0.0, compare=False)
    """Seconds per token, beyond `base`, in the largest measured step. On a GPU small steps only wait for the weights,
    so this is more than `per_token`, which fits all steps."""

    def seconds(self, tokens: int, kv: int) -> float:
        """Return the time of a step that computes `tokens` and reads `kv` tokens of KV."""
        return self.base + self.per_token * tokens + self.per_kv * kv

    @property
    def ideal(self) -> float:
        """Seconds of the smallest step."""
        return self.base + self.per_token

    def tokens_within(self, seconds: float) -> int:
        """Return the most tokens, but at least one, that a step computes in `seconds`, without the cost of reading
        KV; 0: no limit was found."""
        each = max(self.per_token, self.at_scale)
        return max(1, int((seconds - self.base) / each)) if each else 0

    @property
    def knee(self) -> int:
        """Tokens in a step at which it takes twice its ideal time; 0: no limit was found."""
        return int((KNEE * self.ideal - self.base) / self.per_token) if self.per_token else 0

    @property
    def ideal_tokens(self) -> int:
        """Tokens of KV up to which a decode step takes at most 1.2 times its ideal; 0: no limit was found."""
        return max(1, int((NEAR_IDEAL - 1.0) * self.ideal / self.per_kv)) if self.per_kv else 0


def fit_times(times: Iterable[StepTime]) -> StepCost:
    """Return the model that fits the fastest runs."""
    return fit(Observation(time.tokens, time.kv, time.fastest) for time in times)


def fit(observations: Iterable[Observation]) -> StepCost:
    """Return the model with the least squares of relative errors and no negative coefficient.

    Of steps of equal size the fastest counts: a delay is not a property of the step. For the same reason no step
    counts as slower than one that computes and reads at least as much. A term that stays below a
    twentieth of the ideal time even in the largest steps counts as noise. Without observations all terms are zero.
    """
    fastest: dict[tuple[int, int], float] = {}
    for tokens, kv, seconds in observations:
        fastest[tokens, kv] = min(seconds, fastest.get((tokens, kv), seconds))
    seen = [Observation(tokens, kv, seconds) for (tokens, kv), seconds in sorted(fastest.items()) if seconds > 0]
    if not seen:
        return StepCost()
    seen = [o._replace(seconds=min(p.seconds for p in seen if p.tokens >= o.tokens and p.kv >= o.kv)) for o in seen]
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
    """Solve non-negative least squares over some of the three terms: the best of all solvable subsets, and of two
    equally good ones the first. The subset of `base` alone is always solvable."""
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
    """Return the coefficients, 0 if not `chosen`, with which the rows are nearest to 1; None if the rows do not
    determine them."""
    scale = [max(row[i] for row in rows) or 1.0 for i in chosen]
    columns = [[row[i] / s for row in rows] for i, s in zip(chosen, scale, strict=True)]
    matrix = [[_dot(a, b) for b in columns] + [sum(a)] for a in columns]
    solution = _eliminate(matrix)
    if solution is None:
        return None
    by_term = dict(zip(chosen, (x / s for x, s in zip(solution, scale, strict=True)), strict=True))
    return tuple(by_term.get(i, 0.0) for i in range(3))


def _eliminate(matrix: list[list[float]]) -> list[float] | None:
    """Solve n rows of n + 1 by Gauss-Jordan; without pivoting, because the matrix of normal equations is positive.
    Return None if it is singular."""
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
