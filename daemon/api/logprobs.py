"""Logprobs in the two formats of the API: a list of entries for chat, parallel lists for text completions.

Entries become JSON as they arrive. Encoded at the end, those of a long answer would hold the event loop for long.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from daemon.ipc.messages import TokenLogprobs

_FLOOR = -9999.0  # JSON has no minus infinity

_json = msgspec.json.Encoder().encode


class TokenTexts(Protocol):
    """The part of a tokenizer that the formats use."""

    def token_bytes(self, token: int) -> bytes: ...

    def token_text(self, token: int) -> str: ...


class ShownText(Protocol):
    """The text of a stream of tokens, as its client sees it."""

    def push(self, tokens: Sequence[int]) -> str: ...


class LogprobsFormat(Protocol):
    """Collects the entries of tokens between two calls of `take`."""

    def add(self, tokens: list[int], logprobs: list[TokenLogprobs | None] | None) -> None:
        """Add one entry per token; `logprobs` may be longer than `tokens`."""
        ...

    def take(self) -> msgspec.Raw | None:
        """Return the entries since the last call as the JSON of the API's object; None if there are none."""
        ...


class JsonList:
    """A JSON list that is encoded piece by piece."""

    __slots__ = ("_head", "_items", "_tail")

    def __init__(self, head: bytes = b"", tail: bytes = b"") -> None:
        """`head` and `tail` go around the list: to add them later would copy it."""
        self._head, self._tail = head + b"[", b"]" + tail
        self._items = bytearray()

    def extend(self, items: list[Any]) -> None:
        if items:
            self._items += b"," if self._items else self._head
            self._items += memoryview(_json(items))[1:-1]

    def take(self) -> bytearray:
        """Return the JSON of all items since the last call; empty if there are none."""
        items, self._items = self._items, bytearray()
        if items:
            items += self._tail
        return items


class ChatLogprobs:
    """``{"content": [{"token", "logprob", "bytes", "top_logprobs": [...]}, ...], "refusal": null}``"""

    def __init__(self, texts: TokenTexts, ids: bool = False) -> None:
        """`ids`: name each token by its id, as ``token_id:7``."""
        self._texts = texts
        self._name = _token_id if ids else texts.token_text
        self._content = JsonList(b'{"content":', b',"refusal":null}')

    def add(self, tokens: list[int], logprobs: list[TokenLogprobs | None] | None) -> None:
        entries = []
        for token, found in zip(tokens, logprobs or [None] * len(tokens), strict=False):
            entry = self._entry(token, found.logprob if found else _FLOOR)
            pairs = zip(found.top_ids, found.top_logprobs, strict=True) if found else ()
            entry["top_logprobs"] = [self._entry(top, value) for top, value in pairs]
            entries.append(entry)
        self._content.extend(entries)

    def take(self) -> msgspec.Raw | None:
        content = self._content.take()
        return msgspec.Raw(content) if content else None

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self._texts.token_bytes(token)
        return {"token": self._name(token), "logprob": _finite(logprob), "bytes": list(raw)}


class TextLogprobs:
    """``{"tokens", "token_logprobs", "top_logprobs", "text_offset"}``, four lists of one length."""

    def __init__(self, texts: TokenTexts, shown: ShownText, top: int, ids: bool = False) -> None:
        """`shown`: gives the text of the output, to which the offsets refer. `top`: number of alternatives per token;
        if 0, `top_logprobs` is null. `ids`: name tokens by their ids.
        """
        self._shown = shown
        self._name = _token_id if ids else texts.token_text
        self._top = top
        self._offset = 0  # characters
        self._tokens, self._values, self._tops, self._offsets = (JsonList() for _ in range(4))

    def add(self, tokens: list[int], logprobs: list[TokenLogprobs | None] | None) -> None:
        self._add(tokens, logprobs or [None] * len(tokens), self._shown, _FLOOR)

    def add_prompt(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs | None], shown: ShownText) -> None:
        """Add tokens of the prompt, before the first token of the output. `shown`: gives the text of the prompt.

        The first token has no logprobs: its entries are null.
        """
        self._add(tokens, logprobs, shown, None)

    def _add(
        self,
        tokens: Sequence[int],
        logprobs: Sequence[TokenLogprobs | None],
        shown: ShownText,
        missing: float | None,
    ) -> None:
        """`missing`: logprob of a token that has none."""
        names, values, tops, offsets = [], [], [], []
        for token, found in zip(tokens, logprobs, strict=False):
            name, value = self._name(token), _finite(found.logprob) if found else missing
            names.append(name)
            values.append(value)
            offsets.append(self._offset)
            self._offset += len(shown.push([token]))
            if self._top:
                tops.append(None if value is None else self._alternatives(name, value, found))
        self._tokens.extend(names)
        self._values.extend(values)
        self._tops.extend(tops)
        self._offsets.extend(offsets)

    def take(self) -> msgspec.Raw | None:
        tokens = self._tokens.take()
        if not tokens:
            return None
        parts = (
            *(b'{"tokens":', tokens),
            *(b',"token_logprobs":', self._values.take()),
            *(b',"top_logprobs":', self._tops.take() or b"null"),
            *(b',"text_offset":', self._offsets.take()),
            b"}",
        )
        return msgspec.Raw(b"".join(parts))

    def _alternatives(self, name: str, value: float, found: TokenLogprobs | None) -> dict[str, float]:
        """Return the most likely tokens and, as the API requires, the sampled token."""
        pairs = zip(found.top_ids, found.top_logprobs, strict=True) if found else ()
        tops: dict[str, float] = {}
        for top, logprob in pairs:
            tops.setdefault(self._name(top), _finite(logprob))
        tops.setdefault(name, value)
        return tops


def _token_id(token: int) -> str:
    return f"token_id:{token}"


def _finite(logprob: float) -> float:
    return logprob if logprob > _FLOOR else _FLOOR  # also for NaN
