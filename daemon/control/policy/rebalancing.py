"""Rebalancing: which engines are paired for migration, source and destination (Llumnix, section 4.4.3). Pure.

Once a period: sources are the engines below the low threshold, destinations those above the high threshold. The
least free source is paired with the freest destination, and so on. The source picks the requests (section 4.4.2)
and migrates one after another for as long as the pair holds. A pair holds until one side has crossed its threshold by
`delta`, or until the freeness of the source reaches that of the destination. So noise around a threshold neither
makes and breaks pairs, nor reverses them where both thresholds are equal, as in the published experiments. A
draining engine must give away all that it has: it is paired first, and if no engine is above the low threshold,
with the freest one.

An engine is no destination for a source that cannot copy into its KV pool (yet), or whose KV has another
fingerprint. Only a draining source is paired with it all the same if there is no other: its waiting requests need
no copy.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from daemon.control.policy.freeness import LLUMD, SERVING, Policy
from daemon.enums import MigrationReason, Resource
from daemon.ipc.messages import EngineFacts, EngineState, PoolState, pool_state


class Pair(NamedTuple):
    """`source` moves requests to `destination` (indices of engines) while the pair holds."""

    source: int
    destination: int
    reason: MigrationReason


@dataclass(frozen=True, slots=True)
class RebalanceRules:
    """Thresholds are freeness in tokens a request. Raises ValueError for values that make no sense."""

    policy: Policy = LLUMD
    low: float = LLUMD.thresholds.migrate_low
    high: float = LLUMD.thresholds.migrate_high
    delta: float = 16.0  # hysteresis: a pair ends this far beyond a threshold, and begins with this much difference
    per_engine: int = 1  # pairs and migrations that an engine takes part in at once

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise ValueError(f"the low threshold {self.low:g} lies above the high threshold {self.high:g}")
        if self.delta < 0 or self.per_engine < 1:
            raise ValueError("delta must not be negative, and per_engine must be at least 1")

    @classmethod
    def of(cls, policy: Policy) -> RebalanceRules:
        """Return rules with the policy's own thresholds."""
        return cls(policy, policy.thresholds.migrate_low, policy.thresholds.migrate_high)


def pair(facts: Sequence[EngineFacts | None], rules: RebalanceRules, held: Sequence[Pair] = ()) -> list[Pair]:
    """Return the pairs of this period. `held`: the pairs of the last period, as this function returned them.

    No engine is both source and destination, and none is in more than `rules.per_engine` pairs.
    """
    pairing = _Pairing(facts, rules)
    for old in held:
        pairing.renew(old)
    for _ in range(rules.per_engine):
        pairing.add_pairs()
    return pairing.pairs


def explain(facts: Sequence[EngineFacts | None], rules: RebalanceRules, held: Sequence[Pair] = ()) -> str:
    """Return what `pair` would do and why, with a line for each engine and each pair."""
    pairing = _Pairing(facts, rules)
    lines = [f"policy {rules.policy.name}: gives below {rules.low:g}, takes above {rules.high:g} tokens a request"]
    lines += [f"engine {i}: {text}" for i, text in enumerate(pairing.describe_engines())]
    before = {(p.source, p.destination) for p in held}
    for p in pair(facts, rules, held):
        verb = "goes on moving" if (p.source, p.destination) in before else "would move"
        lines.append(f"engine {p.source} {verb} requests to engine {p.destination}: {p.reason}")
    if len(lines) == 1 + len(facts):
        lines.append("nothing to move")
    return "\n".join(lines)


class _Pairing:
    """The engines of one period with their freeness, computed once, and the pairs made so far."""

    def __init__(self, facts: Sequence[EngineFacts | None], rules: RebalanceRules) -> None:
        self.facts = facts
        self.rules = rules
        self.freeness = [rules.policy.migration(f) if f is not None else 0.0 for f in facts]
        self.pairs: list[Pair] = []
        self.as_source: Counter[int] = Counter()  # pairs by source
        self.as_destination: Counter[int] = Counter()  # pairs by destination

    def renew(self, old: Pair) -> None:
        """Keep a pair if both sides are still within their thresholds, widened by delta."""
        if max(old.source, old.destination) >= len(self.facts) or self._is_paired(old.source, old.destination):
            return
        if not self._reaches(old.source, old.destination):
            return
        renewed = self._evaluate(old.source, old.destination, held=True)
        num_pairs = max(self.as_source[old.source], self.as_destination[old.destination])
        if renewed is not None and num_pairs < self.rules.per_engine:
            self._append(renewed)

    def add_pairs(self) -> None:
        """Pair each source, the least free first, with the freest destination that suits it."""
        sources = [i for i in self._available() if self._source_reason(i, self.rules.low)]
        for i in sorted(sources, key=lambda i: self.freeness[i]):
            candidates = [j for j in self._available() if self._accepts_requests(j)]
            candidates.sort(key=lambda j: (self.as_destination[j], not self._reaches(i, j), -self.freeness[j]))
            made = (self._evaluate(i, j, held=False) for j in candidates if self._may_begin(i, j))
            best = next((p for p in made if p is not None), None)
            if best is not None:
                self._append(best)

    def describe_engines(self) -> Iterator[str]:
        """Yield a line for each engine: its state, its load and its role."""
        for i, facts in enumerate(self.facts):
            if facts is None:
                yield "absent"
                continue
            state = EngineState(facts.state).name.lower()
            load = f"{facts.running} running, {facts.waiting} waiting, freeness {_text(self.freeness[i])}"
            yield f"{state}, {load}: {self._role(i)}{self._closed_pools(i)}"

    def _role(self, i: int) -> str:
        reason = self._source_reason(i, self.rules.low)
        if reason:
            return f"gives ({reason})"
        return "takes" if self._is_destination(i, self.rules.high) else "stays as it is"

    def _closed_pools(self, i: int) -> str:
        """Return into whose pools `i` cannot copy blocks (yet), as the end of a line; "" if it can into all."""
        serving = [j for j, other in enumerate(self.facts) if other is not None and other.state == SERVING and j != i]
        mine = self.facts[i]
        other = [str(j) for j in serving if mine and mine.fingerprint != _fingerprint(self.facts[j])]
        closed = [str(j) for j in serving if not self._reaches(i, j) and str(j) not in other]
        text = f"; cannot copy to engine {', '.join(closed)} (yet)" if closed else ""
        return f"{text}; other weights or KV than engine {', '.join(other)}" if other else text

    def _append(self, new: Pair) -> None:
        self.pairs.append(new)
        self.as_source[new.source] += 1
        self.as_destination[new.destination] += 1

    def _available(self) -> list[int]:
        """Return the engines that can take part in one more pair."""
        limit = self.rules.per_engine
        return [i for i, f in enumerate(self.facts) if f is not None and self._num_moves(i, f) < limit]

    def _num_moves(self, i: int, facts: EngineFacts) -> int:
        """Return the pairs of an engine, or its migrations if more: those of ended pairs may still run."""
        return max(self.as_source[i] + self.as_destination[i], facts.incoming + facts.outgoing)

    def _may_begin(self, i: int, j: int) -> bool:
        """Return True if a new pair leaves each engine with one role, migrations of ended pairs included."""
        source, destination = self.facts[i], self.facts[j]
        assert source is not None and destination is not None
        still_receiving = source.incoming and source.state == SERVING
        return not (still_receiving or destination.outgoing or self._is_paired(i, j))

    def _is_paired(self, i: int, j: int) -> bool:
        return any(p.source == i and p.destination == j for p in self.pairs)

    def _evaluate(self, i: int, j: int, *, held: bool) -> Pair | None:
        """Return the pair of source `i` and destination `j`, or None if it must not be made or held.

        A pair is made if both sides are within their thresholds and differ by more than delta. It is held until the
        source is as free as the destination, or one side is out of its threshold by delta.
        """
        delta, min_difference = (self.rules.delta, 0.0) if held else (0.0, self.rules.delta)
        if not self._compatible(i, j) or self.as_destination[i] or self.as_source[j]:
            return None
        reason = self._source_reason(i, self.rules.low + delta)
        if reason == MigrationReason.DRAINING:
            return Pair(i, j, reason) if self._accepts_drain(i, j, delta) else None
        if not self._reaches(i, j):
            return None
        better = self.freeness[i] + min_difference < self.freeness[j]
        return Pair(i, j, reason) if reason and better and self._is_destination(j, self.rules.high - delta) else None

    def _compatible(self, i: int, j: int) -> bool:
        source, destination = self.facts[i], self.facts[j]
        return source is not None and destination is not None and source.block_size == destination.block_size

    def _reaches(self, i: int, j: int) -> bool:
        """Return True if engine `j` can use the KV of engine `i`, and `i` can copy it there or does not say."""
        source, destination = self.facts[i], self.facts[j]
        if source is None or destination is None or source.fingerprint != destination.fingerprint:
            return False
        return pool_state(source, j) is PoolState.OPEN

    def _accepts_drain(self, i: int, j: int, delta: float) -> bool:
        """Return True if `j` accepts the requests of the draining engine `i`.

        It does if it is above the low threshold, or if it is the freest of all compatible engines, those alone into
        whose pools `i` can copy if it can copy into that of `j`. It will decline requests that do not fit.
        """
        if self._is_destination(j, self.rules.low - delta):
            return True
        if not self._accepts_requests(j):
            return False
        compatible = (k for k in range(len(self.facts)) if self._compatible(i, k) and self._accepts_requests(k))
        equal = (k for k in compatible if self._reaches(i, k) >= self._reaches(i, j))
        return self.freeness[j] >= max(self.freeness[k] for k in equal) - delta

    def _source_reason(self, i: int, threshold: float) -> MigrationReason | None:
        """Return why engine `i` should give requests away, or None if it should not."""
        facts = self.facts[i]
        assert facts is not None
        requests = facts.running + facts.waiting
        if facts.state != SERVING:
            return MigrationReason.DRAINING if requests else None
        if self.rules.policy.sheds_preempted and facts.preempted_waiting:
            return MigrationReason.PREEMPTED
        if self.freeness[i] >= threshold or requests < 2:  # a lone request is no better off on another engine
            return None
        scarcest = self.rules.policy.scarcest_resource(facts)
        return MigrationReason.MEMORY if scarcest is Resource.MEMORY else MigrationReason.COMPUTE

    def _is_destination(self, j: int, threshold: float) -> bool:
        return self._accepts_requests(j) and self.freeness[j] > threshold

    def _accepts_requests(self, j: int) -> bool:
        """Return True if any request may be moved to engine `j`."""
        facts = self.facts[j]
        assert facts is not None
        shedding = self.rules.policy.sheds_preempted and facts.preempted_waiting
        return facts.state == SERVING and not shedding


def _fingerprint(facts: EngineFacts | None) -> int:
    return facts.fingerprint if facts is not None else 0


def _text(freeness: float) -> str:
    """Return a freeness as text. An empty engine has the greatest, one that only gives has the least."""
    if math.isinf(freeness):
        return "max" if freeness > 0 else "min"
    return f"{freeness:.0f}"
