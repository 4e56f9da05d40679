"""Python imports this first if its folder is in PYTHONPATH: makes the hash engine raise for certain prompts.

Only tests put it there. A prompt that begins with RAISES raises in each step that computes it. One that begins with
BREAKS breaks the runner: from then on every step of its process raises.
"""

from __future__ import annotations

from typing import Any

from daemon.engine.fake.hash import HashRunner
from daemon.engine.runner import StepPlan

RAISES, BREAKS = 13, 14

_launch = HashRunner.launch
_broken: list[bool] = []


def launch(self: HashRunner, plan: StepPlan) -> Any:
    first_tokens = {row.request.tokens[0] for row in plan.rows}
    if BREAKS in first_tokens:
        _broken.append(True)
    if _broken or RAISES in first_tokens:
        raise ZeroDivisionError("division by zero")
    return _launch(self, plan)


if __name__ == "sitecustomize":  # not where a test imports the constants
    HashRunner.launch = launch
