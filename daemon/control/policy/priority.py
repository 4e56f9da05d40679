"""Priority classes as users write them: a word or a number. Below 0 is high priority; lower runs first. Pure."""

from __future__ import annotations

import re

PRIORITIES = {"high": -1, "normal": 0, "low": 1}
LOWEST, HIGHEST = -100, 100
ALLOWED = f"{', '.join(PRIORITIES)} or a whole number from {LOWEST} to {HIGHEST}"


def parse_priority(text: str) -> int:
    """Return the class that `text` names, a word or a number.

    Raises ValueError with a message that lists what is allowed and does not repeat `text`.
    """
    if text in PRIORITIES:
        return PRIORITIES[text]
    if not re.fullmatch(r"-?[0-9]{1,3}", text) or not LOWEST <= int(text) <= HIGHEST:
        raise ValueError(f"a priority is {ALLOWED}")
    return int(text)
