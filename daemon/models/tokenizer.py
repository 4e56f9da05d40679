"""Text to tokens and back, from tokenizer.json alone; and the incremental way back for streams.

Decoding is a table from token id to bytes. That holds for the two decoders that Llama models use: byte-level BPE,
and sentencepiece pieces with byte fallback. Any other is refused when the tokenizer is opened.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from daemon.models.model_config import ModelError, check_tokenizer, eos_token_ids, read_json

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """The tokenizer of a Hugging Face model directory.

    `vocab_size` counts ids (largest id + 1), added tokens included; the model's may be larger (padding), never
    smaller. `special_ids` are skipped by `decode`. Raises ModelError for a tokenizer that cannot be used.
    """

    def __init__(self, path: Path) -> None:
        check_tokenizer(path)
        config = read_json(path / "config.json") or {}
        file = path / "tokenizer.json"
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
            state = json.loads(self._tokenizer.to_str())
        except Exception as e:  # the library raises plain Exception
            raise ModelError(f"{file} cannot be used: {e}") from None
        # Files of trained encoders carry these; they would silently cut or fill prompts.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        added = {t["id"]: t for t in state["added_tokens"]}
        self.vocab_size = 1 + max(vocab.values(), default=-1)
        self.special_ids = frozenset(i for i, t in added.items() if t["special"])
        self.eos_ids = eos_token_ids(path, config)
        model_vocab = config.get("vocab_size")
        if isinstance(model_vocab, int) and model_vocab < self.vocab_size:
            raise ModelError(f"{file} has ids up to {self.vocab_size - 1}, the model only {model_vocab} embeddings")
        to_bytes, self._strip_space = _decoder_rules(state.get("decoder"), file)
        self._bytes = [b""] * self.vocab_size
        for token, i in vocab.items():
            self._bytes[i] = to_bytes(token)
        # What a stream shows of each token: "" if nothing, None if the bytes are no whole characters.
        shown = [b"" if i in self.special_ids else data for i, data in enumerate(self._bytes)]
        self._shown_bytes = shown
        self._shown_text = [_text_or_none(data) for data in shown]
        self._spelt_text = list(self._shown_text)
        for i in self.special_ids:
            self._spelt_text[i] = _text_or_none(self._bytes[i])

    def encode(self, text: str, add_special: bool) -> list[int]:
        """Token ids; `add_special` lets the tokenizer add its own, such as a BOS.

        Special tokens spelt out in `text` become those tokens. Lone surrogates become U+FFFD.
        """
        try:
            return self._tokenizer.encode(text, add_special_tokens=add_special).ids
        except (UnicodeEncodeError, TypeError):
            clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            return self._tokenizer.encode(clean, add_special_tokens=add_special).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` without special tokens: what a fresh `detokenizer` makes of them.

        Broken UTF-8 becomes U+FFFD, one for each maximal broken piece; ids beyond the vocabulary are nothing.
        """
        stream = self.detokenizer()
        return stream.push(ids) + stream.finish()

    def detokenizer(self, continuing: bool = False, skip_special: bool = True) -> Detokenizer:
        """A fresh stream. `continuing`: it goes on a prompt, so a sentencepiece leading space is kept."""
        strip = self._strip_space and not continuing
        if skip_special:
            return Detokenizer(self._shown_text, self._shown_bytes, strip)
        return Detokenizer(self._spelt_text, self._bytes, strip)

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token, special ones spelt out; possibly part of a character. b"" if unknown."""
        return self._bytes[token] if 0 <= token < self.vocab_size else b""

    def token_text(self, token: int) -> str:
        """`token_bytes` as text, with U+FFFD for what is no whole character."""
        return self.token_bytes(token).decode("utf-8", "replace")

    def token_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it, such as "<|im_end|>"."""
        return self._tokenizer.token_to_id(token)


class Detokenizer:
    """Turns a stream of tokens into a stream of text: a fold, its state an unfinished character at most.

    The pushes and the finish together are `Tokenizer.decode` of all tokens, however they were cut.
    """

    __slots__ = ("_bytes", "_pending", "_strip", "_text")

    def __init__(self, text: Sequence[str | None], data: Sequence[bytes], strip_space: bool) -> None:
        """`text` and `data` by token id: the token's characters (None: not whole ones) and its bytes."""
        self._text = text
        self._bytes = data
        self._strip = strip_space  # until the first text is out
        self._pending = b""

    def push(self, tokens: Sequence[int]) -> str:
        """The text that these tokens make certain."""
        if len(tokens) == 1 and not self._pending:  # a decode step: the case to be fast in
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
        """What was held back: U+FFFD if the stream ended inside a character."""
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


def _decoder_rules(decoder: dict[str, Any] | None, file: Path) -> tuple[Callable[[str], bytes], bool]:
    """(token string -> bytes, whether the text's first space is an artefact) for the decoder of tokenizer.json."""
    steps = _flatten([decoder] if decoder else [])
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
            return _piece_bytes, strip["start"] == 1
    raise ModelError(
        f"{file}: decoder {' + '.join(kinds) or 'none'} is not supported; "
        "byte-level and sentencepiece (byte fallback) decoders are"
    )


def _flatten(steps: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    for step in steps:
        out += _flatten(step["decoders"]) if step["type"] == "Sequence" else [step]
    return out


def _piece_bytes(token: str) -> bytes:
    if m := _BYTE_TOKEN.fullmatch(token):
        return bytes([int(m[1], 16)])
    return token.replace("▁", " ").encode()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF_CHAR[c] for c in token])
    except KeyError:  # an added token, spelt as itself
        return token.encode()


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level BPE writes bytes with: printable Latin-1 as itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE_OF_CHAR = _byte_alphabet()
