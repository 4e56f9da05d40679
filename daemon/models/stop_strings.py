"""Search for stop strings in streamed text. Pure. The result does not depend on how the text is split into chunks."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Find the stop string that is complete first. If several are complete at the same character, take the longest.

    Text that may be the beginning of a stop string is held back: always less than the longest stop string.
    """

    __slots__ = ("_held", "_stops", "matched")

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises ValueError if a stop string is empty."""
        if not all(stops):
            raise ValueError("a stop string must not be empty")
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None  # the stop string that was found

    def push(self, text: str) -> tuple[str, bool]:
        """Append `text`. Return (text that is certainly before every stop string, True if one was found).

        After a match, further calls return no text.
        """
        if self.matched is not None:
            return "", True
        if not self._stops:
            return text, False
        text = self._held + text
        if (found := self._find(text)) is not None:
            self._held = ""
            begin, self.matched = found
            return text[:begin], True
        keep = max(_open_tail(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """Return the text that is held back. Call this when the stream ends without a match."""
        held, self._held = self._held, ""
        return held

    def _find(self, text: str) -> tuple[int, str] | None:
        hits = [(begin + len(stop), begin, stop) for stop in self._stops if (begin := text.find(stop)) >= 0]
        if not hits:
            return None
        _, begin, stop = min(hits)
        return begin, stop


def _open_tail(text: str, stop: str) -> int:
    """Return the length of the longest suffix of `text` that is a prefix of `stop` and shorter than `stop`."""
    begin = max(0, len(text) - len(stop) + 1)
    while (begin := text.find(stop[0], begin)) >= 0:
        if stop.startswith(text[begin:]):
            return len(text) - begin
        begin += 1
    return 0
