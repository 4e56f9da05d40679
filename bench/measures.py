"""Percentiles, throughput and goodput of a run, computed from its outcomes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from bench.stream import Outcome

PERCENTILES = (50, 90, 99)


class Objectives(NamedTuple):
    """Service-level objectives in seconds; None: no objective."""

    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None

    def met(self, outcome: Outcome) -> bool:
        """Return True if the outcome meets all objectives. A failed request meets none."""
        if not outcome.ok:
            return False
        measured = (outcome.ttft, outcome.tpot, outcome.e2e)
        return all(limit is None or (m or 0.0) <= limit for m, limit in zip(measured, self, strict=True))


def distribution(values: Sequence[float]) -> dict[str, float] | None:
    """Return mean, percentiles (linear interpolation) and maximum; None without values."""
    if len(values) == 0:
        return None
    points = np.percentile(values, PERCENTILES)
    named = {f"p{p}": float(v) for p, v in zip(PERCENTILES, points, strict=True)}
    return {"mean": float(np.mean(values)), **named, "max": float(np.max(values))}


def weighted_distribution(values: Sequence[float], weights: Sequence[float]) -> dict[str, float] | None:
    """As `distribution`, but values[i] counts `weights[i]` times (lower percentiles, no interpolation)."""
    if len(values) == 0:
        return None
    order = np.argsort(values)
    ordered, counts = np.asarray(values)[order], np.asarray(weights)[order]
    reached = np.cumsum(counts)
    at = np.searchsorted(reached, np.asarray(PERCENTILES) / 100 * reached[-1] * (1 - 1e-12))
    named = {f"p{p}": float(ordered[i]) for p, i in zip(PERCENTILES, at, strict=True)}
    return {"mean": float(np.average(ordered, weights=counts)), **named, "max": float(ordered[-1])}


def token_itl(outcomes: Sequence[Outcome]) -> dict[str, float] | None:
    """Return inter-token latency (s) by token: a gap before a chunk of k tokens counts as k gaps of 1/k each."""
    gaps = [(gap, k) for o in outcomes for gap, k in zip(o.gaps, o.gap_tokens, strict=True) if k > 0]
    return weighted_distribution([gap / k for gap, k in gaps], [k for _, k in gaps])


def summary(
    outcomes: Sequence[Outcome], *, seconds: float, cpu_seconds: float, objectives: Objectives
) -> dict[str, Any]:
    """Return the numbers of one run, ready for JSON. Latencies in seconds; `seconds` is the run's wall time."""
    good = [o for o in outcomes if o.ok]
    output_tokens = sum(o.output_tokens for o in good)
    met = sum(objectives.met(o) for o in outcomes)
    chunks = sum(len(o.arrivals) for o in good)
    return {
        "requests": len(outcomes),
        "failed": len(outcomes) - len(good),
        "errors": dict(Counter(o.error for o in outcomes if o.error)),
        "finish": dict(Counter(o.finish for o in good)),
        "seconds": seconds,
        "request_rate": len(good) / seconds,
        "output_tokens": output_tokens,
        "output_tokens_per_second": output_tokens / seconds,
        "tokens_from": "usage" if all(o.usage for o in good) else "chunks",
        "tokens_per_chunk": output_tokens / chunks if chunks else 0.0,
        "prompt_tokens": sum(o.usage.prompt_tokens for o in good if o.usage),
        "ttft": distribution([o.ttft for o in good]),
        "itl": distribution([gap for o in good for gap in o.gaps]),
        "itl_token": token_itl(good),
        "tpot": distribution([o.tpot for o in good if o.tpot is not None]),
        "e2e": distribution([o.e2e for o in good]),
        "lag": distribution([o.lag for o in outcomes]),
        "goodput": met / seconds if any(limit is not None for limit in objectives) else None,
        "objectives_met": met / len(outcomes) if any(limit is not None for limit in objectives) else None,
        "client_cpu_seconds": cpu_seconds,
    }


RATIOS = {
    "output_tokens_per_second": ("output_tokens_per_second",),
    "ttft_p50": ("ttft", "p50"),
    "ttft_p99": ("ttft", "p99"),
    "itl_token_p50": ("itl_token", "p50"),
    "itl_token_p99": ("itl_token", "p99"),
    "tpot_p50": ("tpot", "p50"),
    "e2e_p50": ("e2e", "p50"),
}


def ratios(first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return second over first for runs in alternation: median and range of the rounds' ratios."""
    out = {}
    for name, path in RATIOS.items():
        pairs = [(_pick(a, path), _pick(b, path)) for a, b in zip(first, second, strict=True)]
        found = [b / a for a, b in pairs if a and b]
        if found:
            out[name] = {"median": float(np.median(found)), "min": min(found), "max": max(found)}
    return out


def _pick(run: dict[str, Any], path: tuple[str, ...]) -> float | None:
    value: Any = run
    for key in path:
        value = value and value[key]
    return value
