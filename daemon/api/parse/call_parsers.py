"""The forms in which models write tool calls: one parser for each. Pure.

A call that is not one (its JSON is broken, no tool has its name) stays text, with its markers. A call of which a part
has been told already ends where it breaks, and what follows is text.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from typing import ClassVar

from daemon.api.parse.call_reader import CallReader
from daemon.api.parse.json_scanner import BrokenJson, JsonScanner
from daemon.api.parse.markers import find_marker
from daemon.api.parse.parts import CallArguments, CallBegin, Part, Text

_SPACE = " \t\n\r"
_MAX_NAME = 256  # characters

_State = Callable[[str, int], int]


class CallParser(ABC):
    """Finds the tool calls in the text of a choice.

    A state is a method that reads text from a position on and returns the position that it has come to. If it neither
    comes further nor changes the state, it needs more text. White space before a call, between calls and after the
    last one belongs to no text.
    """

    markers: ClassVar[tuple[str, ...]] = ()
    watching = False
    reasoned = False

    def __init__(self, tools: Collection[str], call_id: Callable[[int], str], *, parallel: bool = True) -> None:
        """`tools`: names that calls may have. `call_id`: id of call 0, 1, ... If not `parallel`, only 0 is told."""
        self._tools = tools
        self._call_id = call_id
        self._parallel = parallel
        self._num_calls = 0
        self._state: _State = self.start
        self._held = ""  # may be the beginning of a marker
        self._raw: list[str] = []  # is text if no call comes of it
        self._space: list[str] = []  # white space at the end of the text, after which a call may come
        self._after_call = False  # no text since the last call
        self._reader = CallReader(self, only_known_keys=False)
        self._parts: list[Part] = []

    def push(self, text: str) -> list[Part]:
        text, at = self._held + text, 0
        while at < len(text):
            before, state = at, self._state
            at = state(text, at)
            if at == before and self._state == state:
                break
        self._held = text[at:]
        return self._take()

    def finish(self) -> list[Part]:
        self.end()
        self._give_back()
        self._say(self._held)
        self._held = ""
        if self._space and not self._after_call:
            self._parts.append(Text("".join(self._space)))
            self._space = []
        return self._take()

    @abstractmethod
    def start(self, text: str, at: int) -> int:
        """The first state."""

    def end(self) -> None:
        """Tell what is left of a call."""
        self._reader.finish()
        self._raw.append(self._reader.take_raw())

    # -- what is found ------------------------------------------------------------------------------

    def begin(self, name: str) -> bool:
        """Begin a call, as `CallReader` asks for."""
        if name not in self._tools:
            return False
        self._raw, self._space = [], []
        if self._counts:
            self._parts.append(CallBegin(self._num_calls, self._call_id(self._num_calls), name))
        self._num_calls += 1
        self._after_call = True
        return True

    def arguments(self, text: str) -> None:
        """Add to the arguments of the call that was begun last."""
        if self._parallel or self._num_calls == 1:
            self._parts.append(CallArguments(self._num_calls - 1, text))

    @property
    def _counts(self) -> bool:
        return self._parallel or not self._num_calls

    def _say(self, text: str) -> None:
        """Tell text, but for white space at its end."""
        said = text.rstrip(_SPACE)
        if not said:
            if text:
                self._space.append(text)
            return
        before = "" if self._after_call else "".join(self._space)
        self._parts.append(Text(before + (said.lstrip(_SPACE) if self._after_call else said)))
        self._after_call = False
        self._space = [text[len(said) :]] if len(said) < len(text) else []

    def _give_back(self) -> None:
        """Tell as text what was no call."""
        raw, self._raw = "".join(self._raw), []
        self._say(raw)

    def _take(self) -> list[Part]:
        parts, self._parts = self._parts, []
        return parts

    # -- states that several forms have -------------------------------------------------------------

    def _text_until(self, text: str, at: int, marker: str, then: _State) -> int:
        """Read text up to a marker, after which `then` goes on."""
        end, found = find_marker(text, at, (marker,))
        if end > at:
            self._say(text[at:end])
        if not found:
            return end
        self._raw.append(marker)
        self._state = then
        return end + len(marker)

    def _read_calls(self, text: str, at: int, *, done: _State, broken: _State) -> int:
        """Read JSON. `done` goes on after its last character, and `broken` at the first wrong one."""
        try:
            at = self._reader.feed(text, at)
        except BrokenJson as e:
            self._raw.append(self._reader.take_raw())
            self._give_back()
            self._state = broken
            return e.at
        if self._reader.done:
            self._state = done
        return at

    def _begin_calls(self, state: _State, *, only_known_keys: bool = False) -> None:
        self._reader = CallReader(self, only_known_keys=only_known_keys)
        self._state = state


class HermesParser(CallParser):
    """``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, any number, anywhere in the text."""

    markers = ("<tool_call>", "</tool_call>")

    def start(self, text: str, at: int) -> int:
        at = self._text_until(text, at, "<tool_call>", self._call)
        if self._state == self._call:
            self._begin_calls(self._call)
        return at

    def _call(self, text: str, at: int) -> int:
        return self._read_calls(text, at, done=self._close, broken=self.start)

    def _close(self, text: str, at: int) -> int:
        at = skip_space(text, at)
        rest = text[at : at + len("</tool_call>")]
        if rest == "</tool_call>":
            self._state = self.start
            return at + len(rest)
        if not "</tool_call>".startswith(rest):
            self._state = self.start
        return at


class LlamaParser(CallParser):
    """``{"name": ..., "parameters": {...}}`` at the beginning or after ``<|python_tag|>``; more calls after ``;``."""

    markers = ("<|python_tag|>",)

    def start(self, text: str, at: int) -> int:
        end = skip_space(text, at)
        self._say(text[at:end])
        if end < len(text):
            if text[end] == "{":
                self._begin_calls(self._call, only_known_keys=True)
            else:
                self._state = self._text
        return end

    def _text(self, text: str, at: int) -> int:
        at = self._text_until(text, at, "<|python_tag|>", self._call)
        if self._state == self._call:
            self._begin_calls(self._call)
        return at

    def _call(self, text: str, at: int) -> int:
        return self._read_calls(text, at, done=self._between, broken=self._text)

    def _between(self, text: str, at: int) -> int:
        end = skip_space(text, at)
        if self._raw:
            self._raw.append(text[at:end])
        if end == len(text):
            return end
        if text[end] == ";" and not self._raw:
            self._raw.append(";")
            return end + 1
        if text[end] == "{":
            self._begin_calls(self._call, only_known_keys=True)
            return end
        rest = text[end : end + len("<|python_tag|>")]
        if rest == "<|python_tag|>":
            self._raw.append(rest)
            self._begin_calls(self._call)
            return end + len(rest)
        if not "<|python_tag|>".startswith(rest):
            self._give_back()
            self._state = self._text
        return end

    def end(self) -> None:
        if self._state == self._between:
            self._raw = []  # a ";" after the last call
        super().end()


class MistralParser(CallParser):
    """``[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]``, or ``[TOOL_CALLS]name[ARGS]{...}`` for each call.

    The newer form may have an id after the name: ``[TOOL_CALLS]name[CALL_ID]id[ARGS]{...}``.
    """

    markers = ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]")

    def start(self, text: str, at: int) -> int:
        return self._text_until(text, at, "[TOOL_CALLS]", self._head)

    def _head(self, text: str, at: int) -> int:
        end = skip_space(text, at)
        self._raw.append(text[at:end])
        if end < len(text):
            self._name: list[str] = []
            self._name_size = 0
            if text[end] in "[{":
                self._begin_calls(self._call)
            else:
                self._state = self._read_name
        return end

    def _call(self, text: str, at: int) -> int:
        return self._read_calls(text, at, done=self.start, broken=self.start)

    def _read_name(self, text: str, at: int) -> int:
        end, marker = find_marker(text, at, ("[ARGS]", "[CALL_ID]", "{"))
        self._name.append(text[at:end])
        then = self._read_id if marker == "[CALL_ID]" else self._before_arguments
        return self._skip_to(text, at, end, marker, then)

    def _read_id(self, text: str, at: int) -> int:
        end, marker = find_marker(text, at, ("[ARGS]",))
        return self._skip_to(text, at, end, marker, self._before_arguments)

    def _skip_to(self, text: str, at: int, end: int, marker: str, then: _State) -> int:
        """Skip a part of the head up to `end`, and a marker there, after which `then` goes on. A head has a limit."""
        after = end if marker == "{" else end + len(marker)
        self._raw.append(text[at:after])
        self._name_size += after - at
        if self._name_size > _MAX_NAME:
            self._give_back()
            self._state = self.start
        elif marker:
            self._state = then
        return after

    def _before_arguments(self, text: str, at: int) -> int:
        end = skip_space(text, at)
        self._raw.append(text[at:end])
        if end < len(text):
            if text[end] == "{" and self.begin("".join(self._name).strip(_SPACE)):
                self._scanner = JsonScanner()
                self._state = self._arguments
            else:
                self._give_back()
                self._state = self.start
        return end

    def _arguments(self, text: str, at: int) -> int:
        out: list[str] = []
        try:
            at = self._scanner.feed(text, at, out)
        except BrokenJson as e:
            out.append(self._scanner.held)
            self._after_call = False
            self._state, at = self.start, e.at
        if self._scanner.done:
            self._state = self.start
        if out:
            self.arguments("".join(out))
        return at

    def end(self) -> None:
        if self._state == self._arguments and self._scanner.held:
            self.arguments(self._scanner.held)
        super().end()


class JsonParser(CallParser):
    """The whole answer is ``{"name": ..., "arguments": {...}}`` or a list of these; it may stand in a code fence."""

    def start(self, text: str, at: int) -> int:
        end = skip_space(text, at)
        self._say(text[at:end])
        if end == len(text):
            return end
        if text[end] in "[{":
            self._begin_calls(self._call, only_known_keys=True)
        elif text[end] == "`":
            self._state = self._fence
        else:
            self._state = self._text
        return end

    def _fence(self, text: str, at: int) -> int:
        for fence in ("```json\n", "```\n"):
            if text.startswith(fence, at):
                self._raw.append(fence)
                self._begin_calls(self._call, only_known_keys=True)
                return at + len(fence)
        if not any(fence.startswith(text[at:]) for fence in ("```json\n", "```\n")):
            self._state = self._text
        return at

    def _call(self, text: str, at: int) -> int:
        return self._read_calls(text, at, done=self._close, broken=self._text)

    def _close(self, text: str, at: int) -> int:
        at = skip_space(text, at)
        rest = text[at : at + 3]
        if rest == "```" or not "```".startswith(rest):
            self._state = self._text
            return at + 3 if rest == "```" else at
        return at

    def _text(self, text: str, at: int) -> int:
        self._say(text[at:])
        return len(text)


def skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in _SPACE:
        at += 1
    return at
