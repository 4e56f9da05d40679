"""Values of a config.json, checked. Each error names its key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from daemon.models.files import ModelError

RawConfig = Mapping[str, Any]


def count(config: RawConfig, key: str, default: int | None = None) -> int:
    """Return a whole number above 0. A missing or null value is `default`; without a default it is an error."""
    value = config.get(key)
    value = default if value is None else value
    if value is None:
        raise ModelError(f"{key} is missing")
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise ModelError(f"{key} is {value!r}; it must be a positive whole number")
    return value


def positive(config: RawConfig, key: str, default: float | None = None) -> float:
    """Return a number above 0. A missing or null value is `default`; without a default it is an error."""
    value = config.get(key)
    value = default if value is None else value
    if value is None:
        raise ModelError(f"{key} is missing")
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise ModelError(f"{key} is {value!r}; it must be a positive number")
    return float(value)


def flag(config: RawConfig, key: str) -> bool:
    """Return a truth value. A missing or null value is False."""
    value = config.get(key) or False
    if not isinstance(value, bool):
        raise ModelError(f"{key} is {value!r}; it must be true or false")
    return value


def numbers(config: RawConfig, key: str, length: int) -> tuple[float, ...]:
    """Return a list of `length` positive numbers."""
    value = config.get(key)
    if not isinstance(value, list) or len(value) != length:
        raise ModelError(f"{key} must be a list of {length} numbers")
    return tuple(positive({key: number}, key) for number in value)


def refuse(config: RawConfig, key: str, why: str) -> None:
    """Raise ModelError if the value of `key` is neither missing nor null nor false."""
    if config.get(key) not in (None, False):
        raise ModelError(f"{key} is {config[key]!r}; {why}")
