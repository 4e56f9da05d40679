"""Finds the marker that ends a stretch of text, as the text arrives. Pure."""

from __future__ import annotations

from collections.abc import Sequence


def find_marker(text: str, at: int, markers: Sequence[str]) -> tuple[int, str]:
    """Return where the first marker after `at` begins, and the marker; (end of what is certainly none, "") if none.

    The rest of `text` may then be the beginning of a marker: hold it back, and put it before the next text.
    """
    hits = [(begin, marker) for marker in markers if (begin := text.find(marker, at)) >= 0]
    if hits:
        return min(hits)
    return len(text) - max(open_end(text, at, marker) for marker in markers), ""


def open_end(text: str, at: int, marker: str) -> int:
    """Return the length of the longest end of `text[at:]` that `marker` begins with and does not end with."""
    begin = max(at, len(text) - len(marker) + 1)
    while (begin := text.find(marker[0], begin)) >= 0:
        if marker.startswith(text[begin:]):
            return len(text) - begin
        begin += 1
    return 0
