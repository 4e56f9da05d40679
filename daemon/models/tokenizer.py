"""The tokenizer: text to tokens and back, and incremental detokenization of streams. Reads only tokenizer.json.

Decoding is a table from token id to bytes. This is exact for the two decoders that Llama models use: byte-level BPE,
and sentencepiece with byte fallback. Opening a tokenizer with another decoder raises ModelError.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import tokenizers

from daemon.models.encoding import TrackedEncoder, encode_text
from daemon.models.files import ModelError, read_json
from daemon.models.model_config import check_tokenizer
from daemon.models.special_tokens import end_token_ids, marked_special
from daemon.models.tracked_text import TrackedText

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_MARKER = re.compile(r"<[^\s<>]+>|\[/?[A-Z_]+\]")


class Tokenizer:
    """The tokenizer of a Hugging Face model directory.

    `vocab_size` is the largest id + 1, with added tokens. The vocabulary of the model may be larger (padding). It may
    be smaller only by added tokens, as the `[PAD]` of Llama 2: text that contains one cannot be computed. `decode`
    skips the tokens in `special_ids`. `marker_ids` are all tokens that control a model and are none of a text: those,
    the ones that end an answer, and added tokens such as `<tool_call>`. `max_token_chars` is the largest number of
    characters of a text that one token can stand for; 0 if there is no bound. Raises ModelError if the tokenizer
    cannot be used.
    """

    def __init__(self, path: Path) -> None:
        check_tokenizer(path)
        config = read_json(path / "config.json") or {}
        file = path / "tokenizer.json"
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
            state = msgspec.json.decode(self._tokenizer.to_str(), type=_State)
        except Exception as e:  # the library raises plain Exception
            raise ModelError(f"{file} cannot be used: {e}") from None
        # Files of encoder models have these settings. They would silently truncate or pad prompts.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        added = {t["id"]: t for t in state.added_tokens}
        self.vocab_size = 1 + max(vocab.values(), default=-1)
        self.special_ids = frozenset(i for i, t in added.items() if t["special"])
        self.eos_ids = end_token_ids(path, config)
        model_vocab = config.get("vocab_size")
        largest = max((i for i in vocab.values() if i not in added), default=-1)
        if isinstance(model_vocab, int) and model_vocab <= largest:
            raise ModelError(f"{file} has token ids up to {largest}, but the model has only {model_vocab} embeddings")
        marked = marked_special(path)
        control = self.special_ids.union(self.eos_ids, (i for i, t in added.items() if t["content"] in marked))
        self.marker_ids = control.union(i for i, t in added.items() if _MARKER.fullmatch(t["content"]))
        self._tracked = TrackedEncoder(self._tokenizer, control, _unknown_id(state.model, vocab))
        to_bytes, self._strip_space = _decoder_rules(state.decoder, file)
        self.max_token_chars = _max_token_chars(state, vocab)
        self._bytes = [b""] * self.vocab_size
        for token, i in vocab.items():
            self._bytes[i] = to_bytes(token)
        # The text that a stream shows for each token: "" for none, None if its bytes are not complete characters.
        shown = [b"" if i in self.special_ids else data for i, data in enumerate(self._bytes)]
        self._shown_bytes = shown
        self._shown_text = [_text_or_none(data) for data in shown]
        self._showing: dict[frozenset[str], tuple[list[str | None], list[bytes]]] = {}
        self._full_text = list(self._shown_text)
        for i in self.special_ids:
            self._full_text[i] = _text_or_none(self._bytes[i])

    def encode(self, text: str, add_special: bool) -> list[int]:
        """Return the token ids of `text`. With `add_special` the tokenizer adds its own tokens, such as BOS.

        A special token that is written in `text` becomes this token, unless `text` is a TrackedText and a client has
        written it. Unpaired surrogates become U+FFFD.
        """
        if isinstance(text, TrackedText):
            return self._tracked.encode(text, add_special)
        return encode_text(self._tokenizer, text, add_special).ids

    def count(self, text: str) -> int:
        """Return the number of tokens of `text` without those that the tokenizer adds itself."""
        return len(encode_text(self._tokenizer, text, False))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids` without special tokens, as a new `detokenizer` does.

        Invalid UTF-8 becomes U+FFFD, one for each maximal invalid sequence. Ids outside the vocabulary give no text.
        """
        stream = self.detokenizer()
        return stream.push(ids) + stream.finish()

    def detokenizer(
        self, continuing: bool = False, skip_special: bool = True, shown: frozenset[str] = frozenset()
    ) -> Detokenizer:
        """Return the detokenizer of a new stream.

        `continuing`: the stream continues a prompt, so the leading space of sentencepiece is kept. `skip_special`:
        special tokens give no text, but for those whose text is in `shown`.
        """
        strip = self._strip_space and not continuing
        if not skip_special:
            return Detokenizer(self._full_text, self._bytes, strip)
        if not shown:
            return Detokenizer(self._shown_text, self._shown_bytes, strip)
        if shown not in self._showing:
            self._showing[shown] = self._show(shown)
        return Detokenizer(*self._showing[shown], strip)

    def _show(self, texts: frozenset[str]) -> tuple[list[str | None], list[bytes]]:
        """Return the tables of a detokenizer that shows the special tokens with these texts."""
        ids = [i for i in self.special_ids if self._full_text[i] in texts]
        if not ids:
            return self._shown_text, self._shown_bytes
        shown_text, shown_bytes = list(self._shown_text), list(self._shown_bytes)
        for i in ids:
            shown_text[i], shown_bytes[i] = self._full_text[i], self._bytes[i]
        return shown_text, shown_bytes

    def marker_id(self, text: str) -> int | None:
        """Return the id of the marker with this text; None if it has no token of its own."""
        token = self._tokenizer.token_to_id(text)
        return token if token in self.marker_ids else None

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of a token, special or not. They may be part of a character. b"" for an unknown id."""
        return self._bytes[token] if 0 <= token < self.vocab_size else b""

    def token_text(self, token: int) -> str:
        """Return `token_bytes` as text, with U+FFFD for incomplete characters."""
        return self.token_bytes(token).decode("utf-8", "replace")


class Detokenizer:
    """Turn a stream of tokens into a stream of text. The state is at most one incomplete character.

    The texts of all `push` calls and `finish` together equal `Tokenizer.decode` of all tokens, however the tokens are
    divided between the calls.
    """

    __slots__ = ("_bytes", "_pending", "_strip", "_text")

    def __init__(self, text: Sequence[str | None], data: Sequence[bytes], strip_space: bool) -> None:
        """`text` and `data`: by token id, the characters of the token (None if incomplete) and its bytes."""
        self._text = text
        self._bytes = data
        self._strip = strip_space  # until the first text is returned
        self._pending = b""

    def push(self, tokens: Sequence[int]) -> str:
        """Append tokens and return the text that is now complete."""
        if len(tokens) == 1 and not self._pending:  # the fast path: one token of a decode step
            token = tokens[0]
            shown = self._text[token] if token < len(self._text) else ""
            if shown is not None:
                return self._out(shown) if self._strip else shown
        known = len(self._bytes)
        data = self._pending + b"".join([self._bytes[t] for t in tokens if t < known])
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._pending = data[used:]
        return self._out(text)

    def finish(self) -> str:
        """Return the rest of the text: U+FFFD if the stream ends inside a character."""
        data, self._pending = self._pending, b""
        return self._out(data.decode("utf-8", "replace"))

    def _out(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text


def _text_or_none(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


class _ModelFacts(msgspec.Struct):
    """What is needed of the model in a tokenizer.json: not its vocabulary and merges, nearly all of the file."""

    unk_token: str | None = None
    unk_id: int | None = None
    byte_fallback: bool | None = None


class _State(msgspec.Struct):
    added_tokens: list[dict[str, Any]]
    model: _ModelFacts
    normalizer: dict[str, Any] | None = None
    pre_tokenizer: dict[str, Any] | None = None
    decoder: dict[str, Any] | None = None


def _decoder_rules(decoder: dict[str, Any] | None, file: Path) -> tuple[Callable[[str], bytes], bool]:
    """Return (function from token string to bytes, True if the first space of a text is to be removed).

    `decoder` is the decoder of tokenizer.json.
    """
    steps = _flatten([decoder])
    kinds = [s["type"] for s in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level_bytes, False
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and kinds[3:] in ([], ["Strip"]):
        pattern, content = steps[0].get("pattern"), steps[0].get("content")
        strip = steps[3] if len(steps) == 4 else {"content": " ", "start": 0, "stop": 0}
        if (
            pattern == {"String": "▁"}
            and content == " "
            and (strip["content"], strip["stop"]) == (" ", 0)
            and strip["start"] in (0, 1)
        ):
            return _sentencepiece_bytes, strip["start"] == 1
    raise ModelError(
        f"{file}: decoder {' + '.join(kinds) or 'none'} is not supported; "
        "supported are byte-level and sentencepiece with byte fallback"
    )


def _unknown_id(model: _ModelFacts, vocab: Mapping[str, int]) -> int | None:
    """Return the id of the unknown token of `model`; None if it has none."""
    named = vocab.get(model.unk_token or "")
    return model.unk_id if named is None else named


def _max_token_chars(state: _State, vocab: Iterable[str]) -> int:
    """Return the largest number of characters that one token can stand for; 0 if there is no bound.

    A token of byte-level BPE has a character for each byte, so its string is at least as
    long as its text. There is no bound if characters vanish: in a normalizer or pre-tokenizer, at an added token that
    takes the spaces beside it, or in an unknown token.
    """
    steps = [step for name in ("normalizer", "pre_tokenizer") for step in _flatten([getattr(state, name)])]
    kinds = {step["type"] for step in steps}
    removes = any(_removes_characters(step) for step in steps)
    strips = any(t["lstrip"] or t["rstrip"] for t in state.added_tokens)
    byte_level = any(step["type"] == "ByteLevel" for step in _flatten([state.decoder]))
    if removes or strips or not (byte_level or state.model.byte_fallback):
        return 0
    # NFC composes a letter and its marks, at most four characters, to one.
    return max(map(len, vocab), default=0) * (4 if "NFC" in kinds else 1)


def _removes_characters(step: dict[str, Any]) -> bool:
    """Return True if this normalizer or pre-tokenizer may shorten a text, other than by NFC, or is not known."""
    match step["type"]:
        case "ByteLevel" | "Digits" | "Metaspace" | "NFC" | "Prepend":
            return False
        case "Replace":
            return len(step["pattern"].get("String") or "") > len(step["content"]) or "Regex" in step["pattern"]
        case "Split":
            return bool(step["behavior"] == "Removed")
    return True


def _flatten(steps: Iterable[dict[str, Any] | None]) -> list[dict[str, Any]]:
    """Return the steps without None, with the members of a Sequence in its place."""
    out: list[dict[str, Any]] = []
    for step in steps:
        if step is not None and step["type"] == "Sequence":
            out += _flatten(step.get("decoders") or step.get("normalizers") or step.get("pretokenizers") or [])
        elif step is not None:
            out.append(step)
    return out


def _sentencepiece_bytes(token: str) -> bytes:
    if m := _BYTE_TOKEN.fullmatch(token):
        return bytes([int(m[1], 16)])
    return token.replace("▁", " ").encode()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return token.translate(_BYTE_OF_CHAR).encode("latin-1")
    except UnicodeEncodeError:  # an added token: its string is its text
        return token.encode()


def _byte_alphabet() -> dict[int, int]:
    """Return the byte of each character of byte-level BPE: printable Latin-1 is itself, the rest is from U+0100.

    The other characters of Latin-1 stand for no byte, so they become one that is not in it.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return dict.fromkeys(others, 0x100) | {0x100 + i: b for i, b in enumerate(others)}


_BYTE_OF_CHAR = _byte_alphabet()
