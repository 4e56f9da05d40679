"""Reads the JSON of tool calls as it arrives: one object with a name and arguments, or a list of them. Pure."""

from __future__ import annotations

import json
from enum import Enum, auto
from typing import Protocol

from daemon.api.parse.json_scanner import BrokenJson, JsonScanner

_SPACE = " \t\n\r"
_ARGUMENTS = ("arguments", "parameters")
_KEYS = ("name", "id", "type", *_ARGUMENTS)


class Calls(Protocol):
    """Takes the calls that a reader finds."""

    def begin(self, name: str) -> bool:
        """Begin the next call; return False, and do nothing, if no call may have this name."""
        ...

    def arguments(self, text: str) -> None:
        """Add to the arguments of the call that has begun."""
        ...


class _State(Enum):
    START = auto()
    OBJECT = auto()  # "{" of the next object of a list
    KEY = auto()
    COLON = auto()
    VALUE = auto()
    AFTER_VALUE = auto()
    AFTER_OBJECT = auto()  # of a list
    DONE = auto()


class CallReader:
    """State of one object or list. `done` is True after its last character. `raw`: what belongs to no call yet.

    A call begins as soon as its name is known and its arguments begin, and its arguments are told as they arrive.
    """

    def __init__(self, calls: Calls, *, only_known_keys: bool) -> None:
        """`only_known_keys`: an object with other keys is no call. Without a marker before it, it is an answer."""
        self._calls = calls
        self._only_known = only_known_keys
        self._state = _State.START
        self._list = False
        self._raw: list[str] = []
        self._reset()

    def _reset(self) -> None:
        self._name: str | None = None
        self._key = ""
        self._keys: set[str] = set()
        self._scanner: JsonScanner | None = None
        self._value: list[str] = []
        self._arguments: str | None = None  # that came before the name
        self._streams = False  # the value is that of arguments that are told as they arrive
        self._begun = False

    @property
    def done(self) -> bool:
        return self._state is _State.DONE

    def take_raw(self) -> str:
        """Return the text that belongs to no call, and forget it."""
        raw, self._raw = "".join(self._raw), []
        return raw

    def feed(self, text: str, at: int) -> int:
        """Read `text` from `at` on, and return the end of what belongs to the calls. Raises BrokenJson.

        After BrokenJson, `take_raw` is what was read since the last whole call; of a call that has begun, nothing.
        """
        begin = at
        try:
            while at < len(text) and not self.done:
                if self._state is _State.VALUE:
                    at = self._feed_value(text, at)
                elif self._state is _State.KEY and self._scanner is not None:
                    at = self._feed_key(text, at)
                elif text[at] in _SPACE:
                    at += 1
                else:
                    self._structure(text[at], at)
                    at += 1
                if not self._begun:
                    self._raw.append(text[begin:at])
                begin = at
        except BrokenJson as e:
            if not self._begun:
                self._raw.append(text[begin : e.at])
            raise
        return at

    def _structure(self, char: str, at: int) -> None:
        """Read a character between keys and values. Raises BrokenJson."""
        state = self._state
        if char == "[" and state is _State.START:
            self._list, self._state = True, _State.OBJECT
        elif char == "{" and state in (_State.START, _State.OBJECT):
            self._reset()
            self._state = _State.KEY
        elif char == '"' and state is _State.KEY:
            self._scanner, self._value = JsonScanner(), []
            self._scanner.feed(char, 0, self._value)
        elif char == ":" and state is _State.COLON:
            self._state = _State.VALUE
        elif char == "," and state is _State.AFTER_VALUE:
            self._state = _State.KEY
        elif char == "}" and (state is _State.AFTER_VALUE or (state is _State.KEY and not self._keys)):
            self._end_object(at)
        elif char == "," and state is _State.AFTER_OBJECT:
            self._state = _State.OBJECT
        elif char == "]" and state is _State.AFTER_OBJECT:
            self._state = _State.DONE
        else:
            raise BrokenJson(at)

    def _feed_key(self, text: str, at: int) -> int:
        scanner = self._scanner
        assert scanner is not None
        at = scanner.feed(text, at, self._value)
        if scanner.done:
            key = self._decode(at)
            if key in self._keys or (self._only_known and key not in _KEYS):
                raise BrokenJson(at)
            self._key, self._scanner, self._state = str(key), None, _State.COLON
            self._keys.add(self._key)
        return at

    def _feed_value(self, text: str, at: int) -> int:
        if self._scanner is None:
            if text[at] in _SPACE:
                return at + 1
            self._scanner, self._value = JsonScanner(), []
            if self._key in _ARGUMENTS:
                self._begin_arguments(text[at], at)
        try:
            at = self._scanner.feed(text, at, self._value)
        except BrokenJson:
            self.finish()
            raise
        if self._streams:
            self._tell()
        if self._scanner.done:
            self._end_value(at)
        return at

    def finish(self) -> None:
        """Tell the rest of the arguments of a call that no text follows."""
        if self._streams and self._scanner is not None:
            self._value.append(self._scanner.held)
            self._tell()
            self._streams = False

    def _tell(self) -> None:
        if text := "".join(self._value):
            self._calls.arguments(text)
        self._value = []

    def _begin_arguments(self, char: str, at: int) -> None:
        if self._arguments is not None or char not in '{"n':
            raise BrokenJson(at)
        if char == "{" and self._name is not None:
            self._begin(self._name, at)
            self._streams = True

    def _end_value(self, at: int) -> None:
        if self._streams:
            self._arguments = ""
        elif self._key == "name":
            name = self._decode(at)
            if not isinstance(name, str):
                raise BrokenJson(at)
            self._name = name
        elif self._key in _ARGUMENTS:
            self._arguments = self._whole_arguments(at)
        self._scanner, self._streams, self._value, self._state = None, False, [], _State.AFTER_VALUE

    def _whole_arguments(self, at: int) -> str:
        """Return the arguments: an object, the text of one, or null for none."""
        value = self._decode(at)
        text = "".join(self._value)
        if isinstance(value, str):
            try:
                text, value = value, json.loads(value or "{}")
            except (ValueError, RecursionError):
                raise BrokenJson(at) from None
        if value is None:
            return ""
        if not isinstance(value, dict):
            raise BrokenJson(at)
        return text

    def _end_object(self, at: int) -> None:
        if not self._begun:
            if self._name is None:
                raise BrokenJson(at)
            self._begin(self._name, at)
            self._calls.arguments(self._arguments or "{}")
        self._state = _State.AFTER_OBJECT if self._list else _State.DONE

    def _begin(self, name: str, at: int) -> None:
        if not self._calls.begin(name):
            raise BrokenJson(at)
        self._begun = True
        self._raw.clear()

    def _decode(self, at: int) -> object:
        try:
            return json.loads("".join(self._value))
        except (ValueError, RecursionError):
            raise BrokenJson(at) from None
