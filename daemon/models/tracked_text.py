"""Strings that know which of their characters a client wrote.

A chat template cuts, trims and joins the strings of messages with its own text. `TrackedText` keeps the origin of
each character through this, so that the tokenizer can tell a control token of the template from one in a message.
What is not tracked character by character counts as the client's as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from typing import Any, SupportsIndex

from jinja2 import Undefined

_CLIENT = b"\x01"
_SLOT = re.compile("\ue000([0-9]+)\ue001")  # stands for a value while text is formatted


class TrackedText(str):
    """A string with an origin for each character: 1 if a client wrote it, 0 if not.

    It equals and hashes like its text. Operators and the methods that chat templates use keep the origin.
    """

    __slots__ = ("_origin",)
    _origin: bytes

    def __new__(cls, text: str, origin: bytes | None = None) -> TrackedText:
        """`origin`: one byte for each character of `text`; None if a client wrote all of it."""
        self = super().__new__(cls, text)
        self._origin = _CLIENT * len(text) if origin is None else origin
        return self

    def __str__(self) -> str:
        return self  # str() of a plain subclass forgets the subclass

    def __add__(self, other: str) -> TrackedText:
        if not isinstance(other, str):
            return NotImplemented
        return TrackedText(super().__add__(other), self._origin + origin(other))

    def __radd__(self, other: str) -> TrackedText:
        if not isinstance(other, str):
            return NotImplemented
        return TrackedText(str.__add__(other, self), origin(other) + self._origin)

    def __mul__(self, times: SupportsIndex) -> TrackedText:
        return TrackedText(super().__mul__(times), self._origin * times.__index__())

    __rmul__ = __mul__

    def __mod__(self, value: Any) -> str:
        return format_percent(self, value)

    def __rmod__(self, template: Any) -> str:
        return format_percent(template, self) if isinstance(template, str) else NotImplemented

    def __getitem__(self, key: SupportsIndex | slice) -> TrackedText:
        part = self._origin[key] if isinstance(key, slice) else bytes((self._origin[key],))
        return TrackedText(super().__getitem__(key), part)

    def __iter__(self) -> Iterator[TrackedText]:
        return (self[i] for i in range(len(self)))

    def strip(self, chars: str | None = None, /) -> TrackedText:
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None, /) -> TrackedText:
        return self[len(self) - len(super().lstrip(chars)) :]

    def rstrip(self, chars: str | None = None, /) -> TrackedText:
        return self[: len(super().rstrip(chars))]

    def removeprefix(self, prefix: str, /) -> TrackedText:
        return self[len(self) - len(super().removeprefix(prefix)) :]

    def removesuffix(self, suffix: str, /) -> TrackedText:
        return self[: len(super().removesuffix(suffix))]

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._parts(super().split(sep, maxsplit), len(sep or ""))

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._parts(super().rsplit(sep, maxsplit), len(sep or ""))

    def splitlines(self, keepends: bool = False) -> list[str]:
        return self._parts(super().splitlines(keepends), 0)

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        before, _, _ = super().partition(sep)
        a, b = len(before), len(before) + len(sep)
        return self[:a], self[a:b], self[b:]

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        before, found, after = super().rpartition(sep)
        a, b = len(before), len(self) - len(after)
        return self[:a], self[a:b] if found else self[:0], self[b:]

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:
        if not old:
            return TrackedText(super().replace(old, new, count))
        return join(new, self.split(old, count))

    def join(self, parts: Iterable[str], /) -> str:
        return join(self, parts)

    def _parts(self, texts: list[str], gap: int) -> list[str]:
        """Return the slices of this text that equal `texts`, in order and with at least `gap` characters between."""
        found, end = [], -gap
        for text in texts:
            start = self.find(text, end + gap)
            end = start + len(text)
            found.append(self[start:end])
        return found  # type: ignore[return-value]


def origin(text: str) -> bytes:
    """Return the origin of each character of `text`: 0 for all if it is a plain string."""
    return text._origin if isinstance(text, TrackedText) else bytes(len(text))


def track(value: Any) -> Any:
    """Return `value` with all its strings as a client's, in lists and as values and keys of dicts too."""
    if isinstance(value, str):
        return TrackedText(value)
    if isinstance(value, dict):
        return {track(k): track(v) for k, v in value.items()}
    if isinstance(value, list):
        return [track(v) for v in value]
    return value


def holds_tracked(value: Any) -> bool:
    """Return True if `value` is a tracked string, or a container of one."""
    if isinstance(value, str):
        return isinstance(value, TrackedText)
    if isinstance(value, Mapping):
        return any(holds_tracked(k) or holds_tracked(v) for k, v in value.items())
    if isinstance(value, list | tuple | set | frozenset | KeysView | ValuesView | ItemsView):
        return any(map(holds_tracked, value))
    return False


def concat(parts: Iterable[str]) -> str:
    """Return the parts as one string. It is a plain one if all parts are."""
    parts = list(parts)
    text = "".join(parts)
    if any(isinstance(part, TrackedText) for part in parts):
        return TrackedText(text, b"".join(map(origin, parts)))
    return text


def join(separator: str, parts: Iterable[str]) -> str:
    """Return ``separator.join(parts)``."""
    pieces: list[str] = []
    for part in parts:
        if not isinstance(part, str):
            raise TypeError(f"expected a string, got {type(part).__name__}")
        pieces += (separator, part)
    return concat(pieces[1:])


def to_text(value: Any) -> str:
    """Return ``str(value)``. The text of any object but a string or a number counts as a client's."""
    text = str(value)
    return text if value is None or isinstance(value, str | int | float | Undefined) else TrackedText(text)


def format_percent(template: str, values: Any) -> str:
    """Return ``template % values``."""
    # Not the operator: it would call __rmod__ of a tracked value, and this function again.
    return _with_slots(template, lambda values: str.__mod__(str.__str__(template), values), values)


def format_braces(template: str, args: tuple[Any, ...], kwargs: dict[str, Any], format_: Callable[..., str]) -> str:
    """Return ``format_(*args, **kwargs)``, which formats `template`."""
    return _with_slots(template, lambda values: format_(*values[0], **values[1]), (args, kwargs))


def _with_slots(template: str, format_: Callable[[Any], str], values: Any) -> str:
    """Format with a mark in the place of each tracked string, then put the strings there."""
    tracked: list[TrackedText] = []

    def slot(value: Any) -> Any:
        if isinstance(value, TrackedText):
            tracked.append(value)
            return f"\ue000{len(tracked) - 1}\ue001"
        if isinstance(value, tuple):
            return tuple(map(slot, value))
        if isinstance(value, dict):
            return {k: slot(v) for k, v in value.items()}
        return value

    text = str.__str__(format_(values))
    slotted = slot(values)
    if not holds_tracked((template, values)):
        return text
    if not holds_tracked((template, slotted)):
        pieces = _SLOT.split(format_(slotted))
        result = concat(tracked[int(p)] if i % 2 and int(p) < len(tracked) else p for i, p in enumerate(pieces))
        if result == text:
            return result
    return TrackedText(text)  # an unusual format, for example one that adds padding: all of it is the client's
