"""What became of a request: the answer that it got, compared with its twin. Pure."""

from __future__ import annotations

import copy
from enum import StrEnum
from typing import Any

from bench.answers import Answer, Broken
from bench.nemesis.clients import Attempt
from bench.nemesis.requests import Template

AROUND = 40  # characters that are shown on both sides of the first difference


class Verdict(StrEnum):
    EXACT = "exact"
    REFUSED = "refused"  # 429 or 503, before anything was computed
    UNANSWERED = "unanswered"  # the connection was closed before any byte, and no outbox had the response
    CUT = "cut"  # the response has begun, and ended in the middle
    CHANGED = "changed"  # it differs from its twin
    FAILED = "failed"  # it says that it has failed

    @property
    def again(self) -> bool:
        """True if a client may send the request again."""
        return self in (Verdict.REFUSED, Verdict.UNANSWERED)

    @property
    def failed(self) -> bool:
        return self in (Verdict.CUT, Verdict.CHANGED, Verdict.FAILED)


def judge(template: Template, attempt: Attempt, twin: Answer, *, guarded: bool) -> tuple[Verdict, str]:
    """Return the verdict about one attempt, and what is wrong. `guarded`: an outbox had the response."""
    try:
        answer = attempt.read(template.stream)
    except Broken as e:
        if attempt.begun or guarded:
            return Verdict.CUT, f"{e}\nlast bytes: {bytes(attempt.body[-300:])!r}"
        return Verdict.UNANSWERED, str(e)
    if answer.status in (429, 503):
        return Verdict.REFUSED, ""
    if answer.errors or answer.status != 200:
        return Verdict.FAILED, f"status {answer.status}: {answer.errors}"
    if difference := first_difference(facts(twin), facts(answer)):
        return Verdict.CHANGED, difference
    return Verdict.EXACT, ""


def facts(answer: Answer) -> dict[str, Any]:
    """Return what must be equal in two answers to the same request.

    How many prompt tokens came from a prefix cache depends on what ran before, so only its place is compared.
    """
    found = {
        "body": copy.deepcopy(answer.body),
        "texts": dict(answer.texts),
        "logprobs": {k: v for k, v in answer.logprobs.items() if v},
        "finishes": dict(answer.finishes),
        "roles": dict(answer.roles),
        "usage": copy.deepcopy(answer.usage),
        "ids": len(answer.ids),
    }
    _forget_cached(found)
    return found


def _forget_cached(value: Any) -> None:
    if isinstance(value, dict):
        value.pop("cached_tokens", None)
        value.pop("model", None)
        for inner in value.values():
            _forget_cached(inner)
    elif isinstance(value, list):
        for inner in value:
            _forget_cached(inner)


def first_difference(expected: Any, got: Any, where: str = "answer") -> str:
    """Return where two values differ first, with what is around; "" if they do not."""
    if expected == got:
        return ""
    if isinstance(expected, dict) and isinstance(got, dict):
        for key in sorted({*expected, *got}, key=str):
            if found := first_difference(expected.get(key), got.get(key), f"{where}.{key}"):
                return found
    if isinstance(expected, list) and isinstance(got, list):
        for i, (a, b) in enumerate(zip(expected, got, strict=False)):
            if found := first_difference(a, b, f"{where}[{i}]"):
                return found
        return f"{where}: expected {len(expected)} entries, got {len(got)}"
    if isinstance(expected, str) and isinstance(got, str):
        at = next(
            (i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), min(len(expected), len(got))
        )
        around = slice(max(0, at - AROUND), at + AROUND)
        lengths = f"lengths {len(expected)} and {len(got)}"
        return f"{where}: first difference at {at} ({lengths}): expected {expected[around]!r}, got {got[around]!r}"
    return f"{where}: expected {expected!r}, got {got!r}"
