"""Conversion of the tokenizer in the metadata of a GGUF file to tokenizer.json and tokenizer_config.json.

GGUF has the vocabulary, but only the name of the pre-tokenizer (`tokenizer.ggml.pre`), which splits text before BPE.
An unknown name is refused: a similar pre-tokenizer would give the model tokens that it was not trained on.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from daemon.models.model_config import ModelError
from daemon.models.special_tokens import END_NAMES

_UNKNOWN, _CONTROL, _USER = 2, 3, 4  # token types
_KEEPS_SPACES = ("<unk>", "<s>", "<|endoftext|>")  # of Phi-3

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_tokenizer(metadata: dict[str, Any], directory: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and, if the metadata has a chat template, chat_template.jinja."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer = _byte_level(metadata)
    elif kind == "llama":
        tokenizer = _sentencepiece(metadata)
    else:
        raise ModelError(
            f"tokenizer {kind!r} is not supported; supported are gpt2 (byte-level BPE) and llama (sentencepiece)"
        )
    tokens = _list(metadata, "tokens", str)
    _add_tokens(tokenizer, tokens, _list(metadata, "token_type", int, len(tokens)), _eats_spaces(metadata))
    named = {f"{n}_token": _token(metadata, tokens, n) for n in ("bos", "eos", "padding", "unknown")}
    if _adds_bos(metadata) and (bos := named["bos_token"]) is not None:
        template = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", "$B:1"], special_tokens=[(bos, tokens.index(bos))]
        )
        tokenizer.post_processor = template
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {_CONFIG_NAMES.get(n, n): t for n, t in named.items() if t is not None}
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    if isinstance(template_text := metadata.get("tokenizer.chat_template"), str):
        (directory / "chat_template.jinja").write_text(template_text, encoding="utf-8")


_CONFIG_NAMES = {"padding_token": "pad_token", "unknown_token": "unk_token"}


def _byte_level(metadata: dict[str, Any]) -> Tokenizer:
    name = metadata.get("tokenizer.ggml.pre", "default")
    if not isinstance(name, str) or name not in _SPLITS:
        raise ModelError(f"pre-tokenizer {name!r} is not supported; supported are {', '.join(sorted(_SPLITS))}")
    vocab = {t: i for i, t in enumerate(_list(metadata, "tokens", str))}
    merges = [tuple(m.split(" ", 1)) for m in _list(metadata, "merges", str)]
    # These vocabularies have whole words that no sequence of merges produces.
    whole_words = name in _LLAMA3_NAMES or name == "tekken"
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=whole_words))
    except Exception as e:  # the library raises plain Exception
        raise ModelError(f"the merges of the tokenizer do not match its vocabulary: {e}") from None
    tokenizer.pre_tokenizer = _SPLITS[name]()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: dict[str, Any]) -> Tokenizer:
    """Return a sentencepiece BPE tokenizer. Merges are in the order of the score of their result, highest first."""
    tokens = _list(metadata, "tokens", str)
    scores, types = (
        _list(metadata, key, kind, len(tokens)) for key, kind in (("scores", float), ("token_type", int))
    )
    vocab = {t: i for i, t in enumerate(tokens)}
    merges = []
    for i, token in enumerate(tokens):
        if types[i] in (1, _USER):
            splits = ((token[:k], token[k:]) for k in range(1, len(token)))
            pairs = sorted((vocab[a], vocab[b], a, b) for a, b in splits if a in vocab and b in vocab)
            merges += [(-scores[i], a, b) for _, _, a, b in pairs]
    merges.sort(key=lambda m: m[0])
    unknown = [t for t, kind in zip(tokens, types, strict=True) if kind == _UNKNOWN]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[(a, b) for _, a, b in merges],
            unk_token=unknown[0] if unknown else None,
            fuse_unk=True,
            byte_fallback=bool(metadata.get("tokenizer.ggml.byte_fallback", True)),
        )
    )
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    spaces: list[Any] = [normalizers.Replace(" ", "▁")]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        spaces.insert(0, normalizers.Prepend("▁"))
        steps.append(decoders.Strip(content=" ", left=1, right=0))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _add_tokens(tokenizer: Tokenizer, tokens: list[str], types: list[int], eats_spaces: bool) -> None:
    tokenizer.add_tokens(
        [
            AddedToken(
                token,
                special=kind != _USER or token in END_NAMES,
                normalized=False,
                rstrip=eats_spaces and token not in _KEEPS_SPACES,
            )
            for token, kind in zip(tokens, types, strict=True)
            # Files are published in which the token that ends a turn has the type of a word.
            if kind in (_UNKNOWN, _CONTROL, _USER) or token in END_NAMES
        ]
    )


def _eats_spaces(metadata: dict[str, Any]) -> bool:
    """Return True if the special tokens include the white space after them. GGUF does not say; Phi-3's do."""
    return metadata.get("general.architecture") == "phi3" and metadata.get("tokenizer.ggml.model") == "llama"


def _adds_bos(metadata: dict[str, Any]) -> bool:
    default = metadata.get("tokenizer.ggml.model") == "llama" or (
        metadata.get("tokenizer.ggml.pre") in {*_LLAMA3_NAMES, "tekken"}
    )
    return bool(metadata.get("tokenizer.ggml.add_bos_token", default))


def _token(metadata: dict[str, Any], tokens: list[str], name: str) -> str | None:
    i = metadata.get(f"tokenizer.ggml.{name}_token_id")
    return tokens[i] if isinstance(i, int) and 0 <= i < len(tokens) else None


def _list(metadata: dict[str, Any], key: str, kind: type, length: int | None = None) -> list[Any]:
    """Return an array of the metadata. Raises ModelError unless all entries are of `kind` and `length` is right."""
    value = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(value, list | tuple) or (key != "merges" and not value):
        raise ModelError(f"the GGUF file has no tokenizer.ggml.{key}")
    if not all(isinstance(entry, kind) for entry in value):
        raise ModelError(f"the GGUF file has an entry in tokenizer.ggml.{key} that is of a wrong type")
    if length is not None and len(value) != length:
        raise ModelError(f"the GGUF file has {len(value)} entries in tokenizer.ggml.{key} for {length} tokens")
    return list(value)


def _gpt2_split() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits_split() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2_split()])


def _regex_split(pattern: str) -> Callable[[], Any]:
    return lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")
_SPLITS: dict[str, Callable[[], Any]] = (
    dict.fromkeys(_LLAMA3_NAMES, _regex_split(_LLAMA3))
    | dict.fromkeys(("smaug-bpe", "dbrx"), _regex_split(_LLAMA3))
    | dict.fromkeys(("gpt-2", "gpt2", "olmo"), _gpt2_split)
    | dict.fromkeys(("smollm", "starcoder", "refact", "codeshell"), _digits_split)
    | {"qwen2": _regex_split(_QWEN2), "deepseek-r1-qwen": _regex_split(_QWEN2), "tekken": _regex_split(_TEKKEN)}
)
