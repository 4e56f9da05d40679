"""Logprobs in the two formats of the API: a list of entries for chat, parallel lists for text completions."""

from __future__ import annotations

from typing import Any, Protocol

from daemon.ipc.messages import TokenLogprobs

_FLOOR = -9999.0  # JSON has no minus infinity


class TokenTexts(Protocol):
    """The part of a tokenizer that the formats use."""

    def token_bytes(self, token: int) -> bytes: ...

    def token_text(self, token: int) -> str: ...


class LogprobsFormat(Protocol):
    """Collects the entries of tokens between two calls of `take`."""

    def add(self, tokens: list[int], logprobs: list[TokenLogprobs | None] | None) -> None:
        """Add one entry per token; `logprobs` may be longer than `tokens`."""
        ...

    def take(self) -> Any:
        """Return the entries since the last call as the API's object; None if there are none."""
        ...


class ChatLogprobs:
    """``{"content": [{"token", "logprob", "bytes", "top_logprobs": [...]}, ...], "refusal": null}``"""

    def __init__(self, texts: TokenTexts, ids: bool = False) -> None:
        """`ids`: name each token by its id, as ``token_id:7``."""
        self._texts = texts
        self._name = _token_id if ids else texts.token_text
        self._entries: list[dict[str, Any]] = []

    def add(self, tokens: list[int], logprobs: list[TokenLogprobs | None] | None) -> None:
        for token, found in zip(tokens, logprobs or [None] * len(tokens), strict=False):
            entry = self._entry(token, found.logprob if found else _FLOOR)
            pairs = zip(found.top_ids, found.top_logprobs, strict=True) if found else ()
            entry["top_logprobs"] = [self._entry(top, value) for top, value in pairs]
            self._entries.append(entry)

    def take(self) -> dict[str, Any] | None:
        entries, self._entries = self._entries, []
        return {"content": entries, "refusal": None} if entries else None

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self._texts.token_bytes(token)
        return {"token": self._name(token), "logprob": _finite(logprob), "bytes": list(raw)}


class TextLogprobs:
    """``{"tokens", "token_logprobs", "top_logprobs", "text_offset"}``, four lists of one length."""

    def __init__(self, texts: TokenTexts, top: int, ids: bool = False) -> None:
        """`top`: number of alternatives per token; if 0, `top_logprobs` is null. `ids`: name tokens by their ids."""
        self._text = texts.token_text
        self._name = _token_id if ids else texts.token_text
        self._top = top
        self._offset = 0  # characters
        self._clear()

    def _clear(self) -> None:
        self._tokens: list[str] = []
        self._values: list[float] = []
        self._tops: list[dict[str, float]] = []
        self._offsets: list[int] = []

    def add(self, tokens: list[int], logprobs: list[TokenLogprobs | None] | None) -> None:
        for token, found in zip(tokens, logprobs or [None] * len(tokens), strict=False):
            text = self._text(token)
            value = _finite(found.logprob) if found else _FLOOR
            self._tokens.append(self._name(token))
            self._values.append(value)
            self._offsets.append(self._offset)
            self._offset += len(text)
            if self._top:
                self._tops.append(self._alternatives(self._tokens[-1], value, found))

    def take(self) -> dict[str, Any] | None:
        if not self._tokens:
            return None
        taken = {
            "tokens": self._tokens,
            "token_logprobs": self._values,
            "top_logprobs": self._tops if self._top else None,
            "text_offset": self._offsets,
        }
        self._clear()
        return taken

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
