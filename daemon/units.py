"""Text to values and back: sizes, durations, booleans, lists and numbers, as options and flags are written. Pure."""

from __future__ import annotations

import re
from typing import Any

_BYTES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BYTES |= {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SECONDS = {"ms": 1e-3, "s": 1.0, "": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_MAX_DIGITS = 30  # float() makes no infinity of them, and int() no error of its own
_DECIMAL = rf"[0-9]{{0,{_MAX_DIGITS}}}\.?[0-9]{{1,{_MAX_DIGITS}}}"
_SHOWN = 40  # characters of a wrong value that an error message repeats
_BOOLS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def parse_size(text: str | int) -> int:
    """Return a number of bytes from `2GiB`, `512M`, `1.5g` or a plain number.

    k, M, G and T are decimal; Ki, Mi, Gi and Ti are binary. Raises ValueError.
    """
    if isinstance(text, int):
        return text
    m = re.fullmatch(rf"\s*({_DECIMAL})\s*((?:[kmgt]i?)?)b?\s*", str(text).lower())
    if not m:
        raise ValueError(f"{quoted(text)} is not a size; write for example 512MiB, 2GiB or a number of bytes")
    return int(float(m[1]) * _BYTES[m[2]])


def parse_seconds(text: str | float) -> float:
    """Return a number of seconds from `30`, `30s`, `250ms`, `5m` or `1h`. Raises ValueError."""
    if isinstance(text, int | float):
        return float(text)
    m = re.fullmatch(rf"\s*({_DECIMAL})\s*(ms|s|m|min|h|)\s*", str(text).lower())
    if not m:
        raise ValueError(f"{quoted(text)} is not a duration; write for example 30s, 250ms or 5m")
    return float(m[1]) * _SECONDS[m[2]]


def parse_whole(text: str | int) -> int:
    """Return a whole number from its decimal digits, with a sign or without. Raises ValueError."""
    if isinstance(text, int) and not isinstance(text, bool):
        return text
    # int() would also take `1_000` and digits of other scripts.
    if not isinstance(text, str) or not re.fullmatch(rf"\s*[+-]?[0-9]{{1,{_MAX_DIGITS}}}\s*", text):
        raise ValueError(f"{quoted(text)} is not a whole number")
    return int(text)


def quoted(raw: object) -> str:
    """Return a value as the user has written it, for an error message: text in quotes, and at most 40 characters."""
    text = str(raw).lower() if isinstance(raw, bool) else str(raw)
    text = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    return repr(text) if isinstance(raw, str) else text


def format_value(value: object, unit: str) -> str:
    """Return the text for which an option of this unit parses to `value`."""
    if isinstance(value, list):
        return ",".join(value)
    if isinstance(value, bool):
        return str(value).lower()
    if unit == "bytes" and isinstance(value, int):
        suffix = next((s for s in ("ti", "gi", "mi", "ki") if value and value % _BYTES[s] == 0), "")
        return f"{value // _BYTES[suffix]}{suffix.capitalize()}B" if suffix else str(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def parse_value(kind: Any, unit: str, raw: Any) -> Any:
    """Return `raw`, a string or a TOML value, as the type `kind`: str, bool, int, float or list[str].

    The units "bytes" and "seconds" allow sizes and durations. Raises ValueError with a text for the user.
    """
    if kind is str:
        return _parse_text(raw)
    if kind is bool:
        return parse_bool(raw)
    if kind == list[str]:
        return parse_list(raw)
    if not isinstance(raw, str | int | float) or isinstance(raw, bool):
        raise ValueError(f"{quoted(raw)} is not a number")
    if unit == "bytes":
        return parse_size(raw)  # type: ignore[arg-type]  # it refuses a float
    if unit == "seconds":
        return parse_seconds(raw)
    return parse_whole(raw) if kind is int else _parse_number(raw)  # type: ignore[arg-type]


def _parse_text(raw: Any) -> str:
    if not isinstance(raw, str):
        raise ValueError(f"{quoted(raw)} is not text; put it in quotes")
    if any(ord(c) < 0x20 or ord(c) == 0x7F for c in raw):
        raise ValueError(f"{quoted(raw)} has a control character")
    return raw


def _parse_number(raw: str | float) -> float:
    if isinstance(raw, str) and not re.fullmatch(rf"\s*[+-]?{_DECIMAL}(e[+-]?[0-9]{{1,3}})?\s*", raw.lower()):
        raise ValueError(f"{quoted(raw)} is not a number")
    return float(raw)


def parse_bool(raw: Any) -> bool:
    """Return a boolean from `true`, `yes`, `on`, `1` and their opposites, in any case. Raises ValueError."""
    if isinstance(raw, bool):
        return raw
    if str(raw).lower() not in _BOOLS:
        raise ValueError(f"{quoted(raw)} is neither true nor false; write one of {', '.join(_BOOLS)}")
    return _BOOLS[str(raw).lower()]


def parse_list(raw: Any) -> list[str]:
    """Return a list of strings from a list or from text with commas. Raises ValueError."""
    if isinstance(raw, str):
        return [part.strip() for part in raw.split(",") if part.strip()]
    if not isinstance(raw, list | tuple) or not all(isinstance(part, str) for part in raw):
        raise ValueError(f"{quoted(raw)} is not a list of texts; separate its entries by commas")
    return list(raw)
