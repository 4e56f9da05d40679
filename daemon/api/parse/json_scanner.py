"""Reads one JSON value as its text arrives: where it ends, and whether it is JSON at all. Pure.

It looks at each character once, and keeps no text but a word (`true`, a number) or an escape that is not complete.
"""

from __future__ import annotations

import re
from enum import Enum, auto

MAX_DEPTH = 128
_MAX_WORD = 400  # characters of a number
_SPACE = " \t\n\r"
_RUN = re.compile(r'[^"\\\x00-\x1f]+')  # inside of a string
_WORD = re.compile(r"[-+.0-9A-Za-z]+")
_VALID_WORD = re.compile(r"true|false|null|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')
_ESCAPE_START = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?")


class BrokenJson(Exception):
    """The text is no JSON from the character at `at` on, counted as `JsonScanner.feed` does."""

    def __init__(self, at: int) -> None:
        super().__init__(f"no JSON at {at}")
        self.at = at


class _Expect(Enum):
    VALUE = auto()
    VALUE_OR_END = auto()  # after "["
    KEY = auto()
    KEY_OR_END = auto()  # after "{"
    COLON = auto()
    COMMA_OR_END = auto()
    IN_STRING = auto()
    IN_WORD = auto()


class JsonScanner:
    """State of one value. `done` is True after its last character, or at the first one after a number or a word.

    `held`: a part of an escape, a number or a word, which was read and is not in any output yet.
    """

    __slots__ = ("_expect", "_stack", "_string_is_key", "done", "held")

    def __init__(self) -> None:
        self._expect = _Expect.VALUE
        self._stack: list[str] = []  # the brackets that close what is open
        self._string_is_key = False
        self.held = ""
        self.done = False

    def feed(self, text: str, at: int, out: list[str]) -> int:
        """Read `text` from `at` on, and return the end of what belongs to the value.

        Append what was read to `out`, with control characters in strings escaped: models write them, and JSON has
        none. Raises BrokenJson.
        """
        while at < len(text) and not self.done:
            if self._expect is _Expect.IN_STRING:
                at = self._in_string(text, at, out)
            elif self._expect is _Expect.IN_WORD:
                at = self._in_word(text, at, out)
            elif text[at] in _SPACE:
                out.append(text[at])
                at += 1
            else:
                at = self._between(text, at, out)
        return at

    def _in_string(self, text: str, at: int, out: list[str]) -> int:
        if self.held:
            return self._in_escape(text, at, out)
        if run := _RUN.match(text, at):
            out.append(run[0])
            return run.end()
        char = text[at]
        if char == "\\":
            self.held = char
        elif char == '"':
            out.append(char)
            if self._string_is_key:
                self._expect = _Expect.COLON
            else:
                self._end_value()
        else:
            out.append(_SHORT.get(char) or f"\\u{ord(char):04x}")
        return at + 1

    def _in_escape(self, text: str, at: int, out: list[str]) -> int:
        held = self.held + text[at]
        if _ESCAPE.fullmatch(held):
            out.append(held)
            self.held = ""
        elif _ESCAPE_START.fullmatch(held):
            self.held = held
        else:
            raise BrokenJson(at)
        return at + 1

    def _in_word(self, text: str, at: int, out: list[str]) -> int:
        if word := _WORD.match(text, at):
            self.held += word[0]
            if len(self.held) > _MAX_WORD:
                raise BrokenJson(at)
            return word.end()
        if not _VALID_WORD.fullmatch(self.held):
            raise BrokenJson(at)
        out.append(self.held)
        self.held = ""
        self._end_value()
        return at

    def _between(self, text: str, at: int, out: list[str]) -> int:
        """Read a character that is not part of a string or a word."""
        char, expect = text[at], self._expect
        closes = expect in (_Expect.VALUE_OR_END, _Expect.KEY_OR_END, _Expect.COMMA_OR_END)
        if closes and self._stack and char == self._stack[-1]:
            self._stack.pop()
            self._end_value()
        elif char == "," and expect is _Expect.COMMA_OR_END:
            self._expect = _Expect.KEY if self._stack[-1] == "}" else _Expect.VALUE
        elif char == ":" and expect is _Expect.COLON:
            self._expect = _Expect.VALUE
        elif char == '"' and expect in (_Expect.KEY, _Expect.KEY_OR_END):
            self._expect, self._string_is_key = _Expect.IN_STRING, True
        elif expect in (_Expect.VALUE, _Expect.VALUE_OR_END):
            return self._begin_value(text, at, out)
        else:
            raise BrokenJson(at)
        out.append(char)
        return at + 1

    def _begin_value(self, text: str, at: int, out: list[str]) -> int:
        char = text[at]
        if char in "{[":
            if len(self._stack) >= MAX_DEPTH:
                raise BrokenJson(at)
            self._stack.append("}" if char == "{" else "]")
            self._expect = _Expect.KEY_OR_END if char == "{" else _Expect.VALUE_OR_END
        elif char == '"':
            self._expect, self._string_is_key = _Expect.IN_STRING, False
        elif _WORD.match(char):
            self._expect = _Expect.IN_WORD
            return at
        else:
            raise BrokenJson(at)
        out.append(char)
        return at + 1

    def _end_value(self) -> None:
        self.done = not self._stack
        self._expect = _Expect.COMMA_OR_END


_SHORT = {"\n": "\\n", "\t": "\\t", "\r": "\\r", "\b": "\\b", "\f": "\\f"}
