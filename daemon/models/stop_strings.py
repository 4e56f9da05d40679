"""Stop strings over a stream of text. Pure: a fold over the pieces, the same however they are cut."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Finds the first stop string to be completed; of several completed at once, the longest.

    Text that may still turn out to begin a stop string is held back, never more than the longest stop string.
    """

    __slots__ = ("_held", "_stops", "matched")

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises ValueError for an empty stop string."""
        if not all(stops):
            raise ValueError("a stop string must not be empty")
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None  # the stop string that ended the text

    def push(self, text: str) -> tuple[str, bool]:
        """(text that is certain to precede every stop string, whether one was found). Nothing follows a match."""
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
        """The text held back; to be called when the stream ends without a match."""
        held, self._held = self._held, ""
        return held

    def _find(self, text: str) -> tuple[int, str] | None:
        hits = [(begin + len(stop), begin, stop) for stop in self._stops if (begin := text.find(stop)) >= 0]
        if not hits:
            return None
        _, begin, stop = min(hits)
        return begin, stop


def _open_tail(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper beginning of `stop`."""
    begin = max(0, len(text) - len(stop) + 1)
    while (begin := text.find(stop[0], begin)) >= 0:
        if stop.startswith(text[begin:]):
            return len(text) - begin
        begin += 1
    return 0
