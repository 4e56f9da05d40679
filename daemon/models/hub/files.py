"""Which files of a repository a model needs, and in which order. Pure.

First come the small files: they tell if the model can be served, and which weights belong to it. Code of a repository
(`*.py`) and pickles (`*.bin`, `*.pt`) are never among them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from daemon.models.files import ModelError, gigabytes

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_CONFIGS = (
    "config.json",
    "generation_config.json",
    "quantize_config.json",  # GPTQ
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    INDEX,
)
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")  # the first that is there
_TEMPLATES = "additional_chat_templates/"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_PART = re.compile(r"-\d{5}-of-\d{5}$")


class RemoteFile(NamedTuple):
    """A file of a repository. `digest`: SHA-256 of its content if `is_lfs`, otherwise its id in git, or ""."""

    size: int
    digest: str
    is_lfs: bool


Listing = Mapping[str, RemoteFile]


def small_files(listing: Listing) -> list[str]:
    """Return the files to fetch first: configuration, tokenizer, chat templates, index of the weights."""
    tokenizer = [name for name in _TOKENIZERS if name in listing][:1]
    templates = sorted(n for n in listing if n.startswith(_TEMPLATES) and n.endswith(".jinja"))
    return [n for n in _CONFIGS if n in listing] + tokenizer + templates


def weight_files(repo: str, listing: Listing, index: Mapping[str, Any] | None) -> list[str]:
    """Return the safetensors files, by the `index` if the repository has one. Raises ModelError if there are none."""
    if index is not None:
        named = index.get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(f, str) for f in named.values()):
            raise ModelError(f"{repo}: {INDEX} has no weight_map")
        shards = sorted(set(named.values()))
        if missing := [f for f in shards if f not in listing]:
            raise ModelError(
                f"{repo} lacks the shard {missing[0]} that its {INDEX} lists; the repository is incomplete"
            )
        return shards
    if SINGLE in listing:
        return [SINGLE]
    raise ModelError(_no_weights(repo, listing))


def check_is_model(repo: str, listing: Listing) -> None:
    """Raise ModelError if the repository cannot be a model directory."""
    if "config.json" in listing:
        if not any(name in listing for name in _TOKENIZERS):
            raise ModelError(f"{repo} has neither {' nor '.join(_TOKENIZERS)}; look for one that has")
        return
    if any(name.endswith(".gguf") for name in listing):
        raise ModelError(f"{repo} has GGUF files only; name one of them: {_choices(repo, listing)}")
    raise ModelError(f"{repo} has no config.json, so it is not a model for text")


def gguf_file(repo: str, names: Iterable[str], wanted: str) -> str:
    """Return the .gguf file that `wanted` names: its path, or the quantisation in its name, such as `Q4_K_M`.

    Raises ModelError if no file or several match, or if the file is a part of a model.
    """
    files = sorted(n for n in names if n.endswith(".gguf"))
    if wanted in files:
        found = [wanted]
    else:
        # A quantisation is a word of the name: Q4_K is not in model-Q4_K_M.gguf.
        word = re.compile(rf"(?:^|[-./]){re.escape(wanted.removesuffix('.gguf'))}$", re.IGNORECASE)
        found = [f for f in files if word.search(_PART.sub("", f.removesuffix(".gguf")))]
    if len(found) == 1 and not _PART.search(found[0].removesuffix(".gguf")):
        return found[0]
    if found and all(_PART.search(f.removesuffix(".gguf")) for f in found):
        raise ModelError(
            f"{repo}: {wanted} is split into {len(found)} files, which llumd does not read; choose another"
        )
    why = f"has several files {wanted}" if found else f"has no file {wanted}"
    listed = {n: RemoteFile(0, "", False) for n in found or files}
    raise ModelError(f"{repo} {why}; " + (f"there are {_choices(repo, listed)}" if files else "it has no GGUF files"))


def _choices(repo: str, listing: Listing) -> str:
    shown = 12
    files = sorted(n for n in listing if n.endswith(".gguf"))
    names = [
        f"{repo}:{file}" + (f" ({gigabytes(listing[file].size)})" if listing[file].size else "") for file in files
    ]
    return ", ".join(names[:shown]) + (f" and {len(files) - shown} more" if len(files) > shown else "")


def _no_weights(repo: str, listing: Listing) -> str:
    if pickles := sorted(n for n in listing if PurePosixPath(n).suffix in _PICKLES):
        return (
            f"{repo} has its weights only as pickles ({pickles[0]}), which can run code when they are loaded, so "
            "llumd refuses them; look for a revision or another repository with safetensors"
        )
    if any(name.endswith(".gguf") for name in listing):
        return f"{repo} has no {SINGLE}; to serve a GGUF file of it, name it: {_choices(repo, listing)}"
    return f"{repo} has neither {SINGLE} nor {INDEX}"
