"""Which engine should give requests to which (Llumnix, section 4.4.3). Pure.

Once a period: sources are engines below the low mark, destinations those above the high mark; the least free
source is paired with the freest destination, and so on. The source picks the requests (section 4.4.2) and moves
one after another for as long as the pair holds. A pair, once made, holds until one side has left its mark by
`delta` or the two have met, so that noise about a mark makes no pair come and go, nor turn round where both
marks are one, as in the published runs. An engine that drains has to get rid of all it has: it goes first, and
where nobody is above a mark it gives to the freest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from daemon.control.policy.freeness import LLUMD, SERVING, Policy
from daemon.enums import MigrationReason, Resource
from daemon.ipc.messages import EngineFacts, EngineState


class Pair(NamedTuple):
    """`source` moves requests to `destination` (indices of engines) while this holds."""

    source: int
    destination: int
    reason: MigrationReason


@dataclass(frozen=True, slots=True)
class RebalanceRules:
    """Marks are freeness in tokens a request. Raises ValueError if they cannot be used."""

    policy: Policy = LLUMD
    low: float = LLUMD.marks.migrate_low
    high: float = LLUMD.marks.migrate_high
    delta: float = 16.0  # how far beyond its mark a side must be for a pair to end, and both apart for one to begin
    per_engine: int = 1  # pairs and migrations that an engine takes part in at once

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise ValueError(f"the low mark {self.low:g} lies above the high mark {self.high:g}")
        if self.delta < 0 or self.per_engine < 1:
            raise ValueError("delta must not be negative, and per_engine at least 1")

    @classmethod
    def of(cls, policy: Policy) -> RebalanceRules:
        """With the policy's own marks."""
        return cls(policy, policy.marks.migrate_low, policy.marks.migrate_high)


def pair(facts: Sequence[EngineFacts | None], config: RebalanceRules, held: Sequence[Pair] = ()) -> list[Pair]:
    """The pairs of this period, given those of the last one: pass what is returned back in.

    No engine is both source and destination, none is in more than `config.per_engine` pairs.
    """
    board = _Board(facts, config)
    for old in held:
        board.keep(old)
    for _ in range(config.per_engine):
        board.extend()
    return board.pairs


def explain(facts: Sequence[EngineFacts | None], config: RebalanceRules, held: Sequence[Pair] = ()) -> str:
    """What `pair` would do and why, a line for each engine and each pair."""
    board = _Board(facts, config)
    lines = [f"policy {config.policy.name}: gives below {config.low:g}, takes above {config.high:g} tokens a request"]
    lines += [f"engine {i}: {text}" for i, text in enumerate(board.describe())]
    before = {(p.source, p.destination) for p in held}
    for p in pair(facts, config, held):
        verb = "goes on moving" if (p.source, p.destination) in before else "would move"
        lines.append(f"engine {p.source} {verb} requests to engine {p.destination}: {p.reason}")
    if len(lines) == 1 + len(facts):
        lines.append("nothing to move")
    return "\n".join(lines)


class _Board:
    """One period's engines, each judged once, and the pairs made so far."""

    def __init__(self, facts: Sequence[EngineFacts | None], config: RebalanceRules) -> None:
        self.facts = facts
        self.config = config
        self.free = [config.policy.migration(f) if f is not None else 0.0 for f in facts]
        self.pairs: list[Pair] = []
        self.giving: Counter[int] = Counter()  # pairs by source
        self.taking: Counter[int] = Counter()  # pairs by destination

    def keep(self, old: Pair) -> None:
        """Renew a pair if both sides are still within their marks, widened by delta."""
        if max(old.source, old.destination) >= len(self.facts) or self._paired(old.source, old.destination):
            return
        made = self._judge(old.source, old.destination, held=True)
        within = max(self.giving[old.source], self.taking[old.destination]) < self.config.per_engine
        if made is not None and within:
            self._add(made)

    def extend(self) -> None:
        """Pair the least free source with the freest destination, as long as there are any."""
        low = self.config.low
        for i in sorted((i for i in self._idle() if self._gives(i, low)), key=lambda i: self.free[i]):
            takers = sorted((j for j in self._idle() if self._open(j)), key=lambda j: (self.taking[j], -self.free[j]))
            made = (self._judge(i, j, held=False) for j in takers if self._may(i, j))
            best = next((p for p in made if p is not None), None)
            if best is not None:
                self._add(best)

    def describe(self) -> Iterator[str]:
        """What each engine is fit for."""
        for i, facts in enumerate(self.facts):
            if facts is None:
                yield "absent"
                continue
            reason = self._gives(i, self.config.low)
            fit = f"gives ({reason})" if reason else "takes" if self._takes(i, self.config.high) else "stays as it is"
            state = EngineState(facts.state).name.lower()
            yield f"{state}, {facts.running} running, {facts.waiting} waiting, freeness {self.free[i]:.0f}: {fit}"

    def _add(self, new: Pair) -> None:
        self.pairs.append(new)
        self.giving[new.source] += 1
        self.taking[new.destination] += 1

    def _idle(self) -> list[int]:
        """Engines that can take part in one more pair; one left over from an ended pair may still be moving."""
        return [i for i, f in enumerate(self.facts) if f is not None and self._busy(i, f) < self.config.per_engine]

    def _busy(self, i: int, facts: EngineFacts) -> int:
        return max(self.giving[i] + self.taking[i], facts.incoming + facts.outgoing)

    def _may(self, i: int, j: int) -> bool:
        """A new pair keeps each engine to one role, also with what it is still moving."""
        source, destination = self.facts[i], self.facts[j]
        assert source is not None and destination is not None
        still_taking = source.incoming and source.state == SERVING
        return not (still_taking or destination.outgoing or self._paired(i, j))

    def _paired(self, i: int, j: int) -> bool:
        return any(p.source == i and p.destination == j for p in self.pairs)

    def _judge(self, i: int, j: int, *, held: bool) -> Pair | None:
        """The pair of source `i` and destination `j`: to be made where their difference is worth it and both
        are within their marks, to be held until they meet or one is out of its mark by delta."""
        delta, worth = (self.config.delta, 0.0) if held else (0.0, self.config.delta)
        if not self._alike(i, j) or self.taking[i] or self.giving[j]:
            return None
        reason = self._gives(i, self.config.low + delta)
        if reason == MigrationReason.DRAINING:
            return Pair(i, j, reason) if self._takes_in(i, j, delta) else None
        better = self.free[i] + worth < self.free[j]
        return Pair(i, j, reason) if reason and better and self._takes(j, self.config.high - delta) else None

    def _alike(self, i: int, j: int) -> bool:
        source, destination = self.facts[i], self.facts[j]
        return source is not None and destination is not None and source.block_size == destination.block_size

    def _takes_in(self, i: int, j: int, delta: float) -> bool:
        """Whether `j` takes what `i` has to get rid of: who is not short itself, and if all are short the freest;
        it will refuse what does not fit."""
        if self._takes(j, self.config.low - delta):
            return True
        open_kin = [self.free[k] for k in range(len(self.facts)) if self._alike(i, k) and self._open(k)]
        return self._open(j) and self.free[j] >= max(open_kin) - delta

    def _gives(self, i: int, mark: float) -> MigrationReason | None:
        facts = self.facts[i]
        assert facts is not None
        requests = facts.running + facts.waiting
        if facts.state != SERVING:
            return MigrationReason.DRAINING if requests else None
        if self.config.policy.sheds_preempted and facts.preempted_waiting:
            return MigrationReason.PREEMPTED
        if self.free[i] >= mark or requests < 2:  # a lone request is no better off elsewhere
            return None
        shortest = self.config.policy.shortest(facts)
        return MigrationReason.MEMORY if shortest is Resource.MEMORY else MigrationReason.COMPUTE

    def _takes(self, j: int, mark: float) -> bool:
        return self._open(j) and self.free[j] > mark

    def _open(self, j: int) -> bool:
        """Whether it may be given anything at all."""
        facts = self.facts[j]
        assert facts is not None
        shedding = self.config.policy.sheds_preempted and facts.preempted_waiting
        return facts.state == SERVING and not shedding
