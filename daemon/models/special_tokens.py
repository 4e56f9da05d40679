"""Special tokens by role: the texts that chat templates use (`bos_token`, ...), and the ids that end an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from daemon.models.files import ModelError, read_json

NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")

# Tokens that end a turn in known chat formats. Models are published whose settings name another token than the one
# that the model emits; these names mean nothing else.
END_NAMES = frozenset(
    {
        "<|im_end|>",  # ChatML
        *("<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|eom|>"),  # Llama 3 and 4
        *("<|end|>", "<|return|>", "<|call|>"),  # Phi, and the o200k harmony format
        *("<end_of_turn>", "<turn|>", "<end_of_utterance>"),  # Gemma, SmolVLM
        *("<|end_of_turn|>", "<|END_OF_TURN_TOKEN|>", "<|endofturn|>"),  # OpenChat, Cohere, EXAONE
        *("<EOT>", "[EOT]"),  # CodeLlama, Kimi
    }
)
# Tokens that end a document. They count only where nothing else is known: they may also separate documents.
_DOCUMENT_END_NAMES = frozenset({"<|endoftext|>", "<|end_of_text|>", "</s>"})
_HARMONY = frozenset({"<|return|>", "<|call|>"})  # with these, <|end|> only separates the parts of one answer


class _AddedToken(msgspec.Struct):
    id: int
    content: str


class _TokenizerFile(msgspec.Struct):
    added_tokens: list[_AddedToken] = []


def special_tokens(path: Path) -> dict[str, str]:
    """Return the special tokens of a model directory by name, for example {"bos_token": "<s>"}.

    Two files may name them, and the order is that of Transformers: special_tokens_map.json is the older one, and goes
    first unless tokenizer_config.json is complete. A name that neither file has is taken from the id in config.json.
    """
    config = read_json(path / "tokenizer_config.json") or {}
    older = read_json(path / "special_tokens_map.json") or {}
    first, second = (config, older) if "added_tokens_decoder" in config else (older, config)
    texts_of = {n: (_text(first.get(n)), _text(second.get(n))) for n in NAMES}
    named = {n: text for n, (a, b) in texts_of.items() if (text := b if a is None else a) is not None}
    ids = read_json(path / "config.json") or {}
    unnamed = {n: ids.get(f"{n}_id") for n in NAMES if n not in named}
    if any(isinstance(i, int) for i in unnamed.values()):
        texts = {i: text for text, i in added_tokens(path).items()}
        named |= {n: texts[i] for n, i in unnamed.items() if isinstance(i, int) and i in texts}
    return named


def marked_special(path: Path) -> set[str]:
    """Return the texts that tokenizer_config.json and special_tokens_map.json mark as special.

    Transformers makes these tokens special, whatever tokenizer.json says.
    """
    files = [read_json(path / name) or {} for name in ("tokenizer_config.json", "special_tokens_map.json")]
    marked: list[Any] = list(special_tokens(path).values())
    for file in files:
        for name in ("additional_special_tokens", "extra_special_tokens"):
            value = file.get(name)
            marked += value if isinstance(value, list) else value.values() if isinstance(value, dict) else []
        decoder = file.get("added_tokens_decoder")
        tokens = decoder.values() if isinstance(decoder, dict) else []
        marked += [token for token in tokens if isinstance(token, dict) and token.get("special") is True]
    return {text for token in marked if (text := _text(token)) is not None}


def end_token_ids(path: Path, config: dict[str, Any]) -> tuple[int, ...]:
    """Return the ids that end an answer: what config.json (`config`) and generation_config.json name as
    `eos_token_id`, the tokenizer's `eos_token`, and added tokens with a known name of an end of turn. If there are
    none of these, a token that ends a document.

    Raises ModelError for an id that is no id. Ids that only the tokenizer gives are inside the vocabulary.
    """
    ids = dict.fromkeys(_configured_ids(path, config))
    added = added_tokens(path)
    names = special_tokens(path)
    vocab_size = config.get("vocab_size")
    usable = {text: i for text, i in added.items() if not isinstance(vocab_size, int) or i < vocab_size}
    ends = usable.keys() & (END_NAMES - {"<|end|>"} if usable.keys() >= _HARMONY else END_NAMES)
    ends |= usable.keys() & {names.get("eos_token", "")}
    if not ids and not ends:
        ends = usable.keys() & (_DOCUMENT_END_NAMES - {names.get("bos_token", "")})
    return tuple(ids | dict.fromkeys(sorted(usable[text] for text in ends)))


def _configured_ids(path: Path, config: dict[str, Any]) -> list[int]:
    ids: list[int] = []
    for source in (config, read_json(path / "generation_config.json") or {}):
        value = source.get("eos_token_id")
        for token in value if isinstance(value, list) else [] if value is None else [value]:
            if not isinstance(token, int) or isinstance(token, bool) or token < 0:
                raise ModelError(f"eos_token_id {token!r} is not a token id (a whole number, 0 or above)")
            ids.append(token)
    return ids


def added_tokens(path: Path) -> dict[str, int]:
    """Return the ids of the added tokens in tokenizer.json by text; none if the file cannot be read.

    Opening the tokenizer reports such a file. Engines do not need it.
    """
    try:
        file = msgspec.json.decode((path / "tokenizer.json").read_bytes(), type=_TokenizerFile)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return {}
    return {token.content: token.id for token in file.added_tokens}


def _text(token: Any) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
