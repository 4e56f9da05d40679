"""One option of the daemon: its declaration, the values that it allows, and its text as a value.

`daemon/config.py` declares all options. llumctl imports this module, so it imports only what loads fast. Pure.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from dataclasses import field
from typing import Any

from daemon.units import format_value, parse_value, quoted

Option = dataclasses.Field[Any]

MAX_TOKENS = 1 << 24  # above the context length of every known model
_DAY = 86400.0  # seconds
_LIMITS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "at_least": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "at_most": ("at most", operator.le),
    "below": ("below", operator.lt),
}


class ConfigError(ValueError):
    """A setting that cannot be used. The message names the option, its source and what the user can do."""


def declare(
    default: Any,
    group: str,
    meaning: str,
    unit: str = "",
    *,
    choices: tuple[Any, ...] = (),
    gpu: Any = None,
    or_zero: bool = False,
    **limits: float,
) -> Any:
    """Declare an option.

    `gpu`: the default for engines on GPUs, if it differs. `limits`: `at_least`, `above`, `at_most` and `below`.
    `or_zero`: 0 is allowed too and has a meaning of its own. A duration is from 0 to a day unless `limits` differ.
    Limits that depend on the machine or on the model are in `cli/limits.py`.
    """
    if unit == "seconds":
        limits = {"at_least": 0, "at_most": _DAY} | limits
    assert limits.keys() <= _LIMITS.keys()
    meta = {"group": group, "meaning": meaning, "unit": unit, "choices": choices, "gpu": gpu, "limits": limits}
    meta |= {"or_zero": or_zero}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=meta)
    return field(default=default, metadata=meta)


def allowed(option: Option) -> str:
    """Describe the values that an option allows: its choices or its limits. Empty if it allows every value."""
    if choices := option.metadata["choices"]:
        return "one of " + ", ".join(map(str, choices))
    described = _describe(option.metadata["limits"], option.metadata["unit"])
    return f"0 or {described}" if option.metadata["or_zero"] else described


def check_limits(option: Option, value: Any) -> None:
    """Raise ValueError unless the option allows `value`. NaN is outside every limit."""
    choices, limits = option.metadata["choices"], option.metadata["limits"]
    if option.metadata["or_zero"] and value == 0:
        return
    within = all(_LIMITS[kind][1](value, bound) for kind, bound in limits.items())
    if not within or (choices and value not in choices):
        shown = quoted(value) if isinstance(value, str) else format_value(value, option.metadata["unit"])
        raise ValueError(f"{shown} is not allowed; it must be {allowed(option)}")


def parse(option: Option, kind: Any, raw: Any) -> Any:
    """Return `raw`, a string or a TOML value, as the value of an option of the type `kind`. Raises ValueError."""
    value = parse_value(kind, option.metadata["unit"], raw)
    choices = option.metadata["choices"]
    if choices and value not in choices:
        raise ValueError(f"{quoted(raw)} is not {allowed(option)}")
    return value


def _describe(limits: dict[str, float], unit: str) -> str:
    if limits.keys() == {"at_least", "at_most"}:
        return f"from {format_value(limits['at_least'], unit)} to {format_value(limits['at_most'], unit)}"
    return " and ".join(f"{_LIMITS[kind][0]} {format_value(bound, unit)}" for kind, bound in limits.items())
