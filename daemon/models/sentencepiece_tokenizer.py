"""Conversion of a tokenizer that a model has only as tokenizer.model (sentencepiece) to tokenizer.json.

The library sentencepiece reads the file, and tells afterwards if the result splits sample texts as it does.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers, processors

from daemon.models.files import ModelError, read_json
from daemon.models.gguf.tokenizer import write_tokenizer

_SAMPLES = (
    "The quick brown fox, 12345.67 times!\n\n\tdef f(x):\n    return {'a': [x]}\n",
    "two  spaces,   three and a trailing one ",
    "naïve café, größer, привет мир, 你好世界, こんにちは, عربى, 🙂👍🏽, e\u0301, \u00a0\u200b\ufeff",
    "x",
)


def convert_tokenizer(source: Path, directory: Path) -> None:
    """Write tokenizer.json for the tokenizer.model in `source`. Raises ModelError if the result would differ."""
    file = source / "tokenizer.model"
    processor, proto = _read(file)
    _check_kind(file, proto)
    config = read_json(source / "tokenizer_config.json") or {}
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        write_tokenizer(_as_gguf(proto), Path(scratch))
        tokenizer = Tokenizer.from_file(str(Path(scratch) / "tokenizer.json"))
    if config.get("legacy") is False:
        # As in Transformers: the first word of a prompt gets a space, if it has none, and no text after a special
        # token does. sentencepiece knows no special tokens, and adds a space in any case.
        scheme = "first" if proto.normalizer_spec.add_dummy_prefix else "never"
        tokenizer.normalizer = normalizers.Sequence([])
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    _add_tokens(file, tokenizer, _added_tokens(source, config))
    _add_ends(tokenizer, config, proto)
    for text in _SAMPLES:
        if tokenizer.encode(text, add_special_tokens=False).ids != processor.encode(text):
            raise ModelError(f"{file} cannot be converted exactly: it splits {text!r} in another way; {_ADVICE}")
    tokenizer.save(str(directory / "tokenizer.json"))


_ADVICE = (
    "make a tokenizer.json with Transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR), and check it"
)


def _read(file: Path) -> tuple[Any, Any]:
    """Return the processor and the parsed file, a ModelProto."""
    try:
        from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
    except ImportError as e:
        raise ModelError(
            f"to read {file}, install what is missing: pip install sentencepiece protobuf ({e})"
        ) from None
    try:
        processor = SentencePieceProcessor(model_file=str(file))
        messages: Any = sentencepiece_model_pb2  # protobuf makes its classes at run time
        return processor, messages.ModelProto.FromString(file.read_bytes())
    except Exception as e:  # the library raises what it likes
        raise ModelError(f"{file} is not a sentencepiece model: {e}; copy it again") from None


def _check_kind(file: Path, proto: Any) -> None:
    """Raise ModelError for what the conversion does not know: other algorithms, and changes of the text before."""
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    reasons = {
        "its model_type is not BPE": trainer.model_type != trainer.BPE,
        f"it changes texts first (normalizer {normalizer.name})": bool(normalizer.precompiled_charsmap),
        "it has remove_extra_whitespaces": normalizer.remove_extra_whitespaces,
        "it has treat_whitespace_as_suffix": trainer.treat_whitespace_as_suffix,
    }
    if found := [reason for reason, holds in reasons.items() if holds]:
        raise ModelError(f"{file} is not supported: {found[0]}; {_ADVICE}")


def _as_gguf(proto: Any) -> dict[str, Any]:
    """Return the tokenizer as GGUF names its parts. The types of the pieces are the same numbers."""
    pieces, trainer = proto.pieces, proto.trainer_spec
    metadata = {
        "model": "llama",
        "tokens": [p.piece for p in pieces],
        "scores": [p.score for p in pieces],
        "token_type": [p.type for p in pieces],
        "unknown_token_id": trainer.unk_id,
        "add_bos_token": False,
        "add_space_prefix": proto.normalizer_spec.add_dummy_prefix,
        "byte_fallback": trainer.byte_fallback,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in metadata.items()}


def _added_tokens(source: Path, config: dict[str, Any]) -> dict[int, AddedToken]:
    """Return the tokens that tokenizer_config.json, or added_tokens.json of older models, adds to the vocabulary."""
    found: dict[int, AddedToken] = {}
    for text, i in (read_json(source / "added_tokens.json") or {}).items():
        if isinstance(i, int):
            found[i] = AddedToken(text, special=True, normalized=False)
    decoder = config.get("added_tokens_decoder")
    for key, token in decoder.items() if isinstance(decoder, dict) else ():
        if str(key).isdecimal() and isinstance(token, dict) and isinstance(token.get("content"), str):
            flags = {n: bool(token.get(n)) for n in ("lstrip", "rstrip", "single_word", "normalized", "special")}
            found[int(key)] = AddedToken(token["content"], **flags)
    return found


def _add_tokens(file: Path, tokenizer: Tokenizer, added: dict[int, AddedToken]) -> None:
    for i, token in sorted(added.items()):
        if tokenizer.token_to_id(token.content) is None:
            (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
        if tokenizer.token_to_id(token.content) != i:
            raise ModelError(f"{file}: the added token {token.content!r} cannot have the id {i}; {_ADVICE}")


def _add_ends(tokenizer: Tokenizer, config: dict[str, Any], proto: Any) -> None:
    """Let the tokenizer add BOS, and EOS, where tokenizer_config.json wants it."""
    pieces, trainer = proto.pieces, proto.trainer_spec
    bos = pieces[trainer.bos_id].piece if 0 <= trainer.bos_id < len(pieces) else None
    eos = pieces[trainer.eos_id].piece if 0 <= trainer.eos_id < len(pieces) else None
    begin = _text(config, "bos_token", bos) if config.get("add_bos_token", True) else None
    end = _text(config, "eos_token", eos) if config.get("add_eos_token", False) else None
    before, after = ([t] if t and tokenizer.token_to_id(t) is not None else [] for t in (begin, end))
    if before or after:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *(f"{t}:1" for t in before), "$B:1", *(f"{t}:1" for t in after)],
            special_tokens=[(t, tokenizer.token_to_id(t)) for t in dict.fromkeys([*before, *after])],
        )


def _text(config: dict[str, Any], name: str, default: str | None) -> str | None:
    value = config.get(name, default)
    return value.get("content") if isinstance(value, dict) else value
