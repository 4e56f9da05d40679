"""Text to tokens, with the control tokens in a client's text as text.

Control tokens (`<|im_start|>`) give a prompt its structure. A chat template writes them. The same characters in a
message are text, or else a message could end its own turn and write the next one.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable
from typing import NamedTuple

import tokenizers

from daemon.models.tracked_text import TrackedText, origin

_SURROGATE = re.compile("[\ud800-\udfff]")


class _Found(NamedTuple):
    """A control token in a text."""

    token: int
    start: int  # in characters
    end: int


def encode_text(tokenizer: tokenizers.Tokenizer, text: str, add_special: bool) -> tokenizers.Encoding:
    """Encode `text`. Unpaired surrogates become U+FFFD.

    `encode` of the library holds the interpreter's lock until it returns, so all threads stand still; `encode_batch`
    does not.
    """
    try:
        return tokenizer.encode_batch([text], add_special_tokens=add_special)[0]
    except (UnicodeEncodeError, TypeError):
        clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return tokenizer.encode_batch([clean], add_special_tokens=add_special)[0]


class TrackedEncoder:
    """Encodes TrackedText: a control token that the client wrote, in whole or in part, is encoded as text.

    The ids are those of `tokenizer` if there is no such token. Otherwise a second tokenizer encodes the prompt. It
    shares the model, and knows each control token only by a random name, which replaces the template's tokens.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, control_ids: Iterable[int], unknown_id: int | None) -> None:
        """`unknown_id`: the token of characters outside the vocabulary, which is no control token there."""
        added = tokenizer.get_added_tokens_decoder()
        secret = secrets.token_hex(16)
        self._tokenizer = tokenizer
        self._unknown_id = unknown_id
        self._control = {i: added[i].content for i in control_ids if i in added}
        self._names = {i: f"<{secret}:{i}>" for i in self._control}
        self._cut = f"<{secret}>"
        self._apart = tokenizers.Tokenizer(tokenizer.model)
        for part in ("normalizer", "pre_tokenizer", "post_processor"):
            if (value := getattr(tokenizer, part)) is not None:
                setattr(self._apart, part, value)
        others = {i: token for i, token in added.items() if i not in self._control}
        named = [_renamed(added[i], name) for i, name in self._names.items()]
        self._apart.add_special_tokens([*named, tokenizers.AddedToken(self._cut, special=True, normalized=False)])
        self._apart.add_tokens(list(others.values()))
        texts = self._names | {i: token.content for i, token in others.items()}
        self._ids = {self._apart.token_to_id(text): i for i, text in texts.items()}
        self._cut_id = self._apart.token_to_id(self._cut)

    def encode(self, text: TrackedText, add_special: bool) -> list[int]:
        """Return the token ids of `text`. With `add_special` the tokenizer adds its own tokens, such as BOS."""
        plain = _SURROGATE.sub("\ufffd", text)  # character by character, so that each keeps its origin
        encoding = encode_text(self._tokenizer, plain, add_special)
        ids, written_by = encoding.ids, origin(text)
        found = self._find(ids, encoding, plain)
        templates = [token for token in found if written_by.find(1, token.start, token.end) < 0]
        return ids if len(templates) == len(found) else self._encode_apart(plain, templates, add_special)

    def _find(self, ids: list[int], encoding: tokenizers.Encoding, text: str) -> list[_Found]:
        """Return the control tokens in `text`, not those that the tokenizer has added."""
        found = []
        for k, i in enumerate(ids):
            if i in self._control and (span := encoding.token_to_chars(k)) is not None:
                # A token may take the spaces beside it.
                start = text.find(self._control[i], *span)
                if start >= 0:
                    found.append(_Found(i, start, start + len(self._control[i])))
                elif i != self._unknown_id:
                    found.append(_Found(i, *span))
        return found

    def _encode_apart(self, text: str, control: list[_Found], add_special: bool) -> list[int]:
        """Return the ids of `text`, in which only the tokens in `control` are control tokens."""
        prompt = _replace_spans(text, [(t.start, t.end, self._names[t.token]) for t in control])
        while True:
            encoding = encode_text(self._apart, prompt, add_special)
            ids, by_tokenizer = encoding.ids, encoding.special_tokens_mask
            forged = [k for k, i in enumerate(ids) if i in self._control and self._is_forged(i, by_tokenizer[k])]
            spans = [span for k in forged if (span := encoding.token_to_chars(k)) and span[1] - span[0] > 1]
            if not spans:
                made = zip(ids, by_tokenizer, strict=True)
                return [i if added else self._ids.get(i, i) for i, added in made if i != self._cut_id or added]
            prompt = _replace_spans(prompt, [(start + 1, start + 1, self._cut) for start, _ in spans])

    def _is_forged(self, i: int, by_tokenizer: int) -> bool:
        """Return True if the model of the tokenizer has made a control token from text. Few contain one as a word."""
        return not by_tokenizer and i not in self._ids and i != self._unknown_id


def _replace_spans(text: str, spans: list[tuple[int, int, str]]) -> str:
    pieces, end = [], 0
    for start, next_start, new in spans:
        pieces += [text[end:start], new]
        end = next_start
    return "".join([*pieces, text[end:]])


def _renamed(token: tokenizers.AddedToken, name: str) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(name, special=True, normalized=False, lstrip=token.lstrip, rstrip=token.rstrip)
