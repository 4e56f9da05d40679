"""Where a GGUF file has the tensors of a model. The `gguf` package knows their names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from daemon.models.families import FAMILIES, Place, Shape
from daemon.models.gguf.config import LONG_FACTORS, ROPE_FACTORS, SHORT_FACTORS
from daemon.models.gguf.file import GGUF
from daemon.models.model_config import ModelConfig, ModelError
from daemon.models.tensors import expected_tensors

_EXPERT = re.compile(r"(model\.layers\.(\d+)\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
_DENSE = re.compile(r"model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj\.weight")
_NO_WEIGHTS = {ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS}  # `config` reads them


def find_places(source: GGUF, config: ModelConfig) -> dict[str, Place]:
    """Return the place of each canonical tensor. Raises ModelError for one that is missing or not needed."""
    rename = _renaming(source)
    found: dict[str, Place] = {}
    for name, shape in expected_tensors(config).items():
        places = list(_candidates(config, rename, name, shape))
        place = next((p for p in places if p.name in source.tensors and _shape(source, p.name) == p.shape), None)
        if place is None:
            _refuse(source, [p for p in places if p.name in source.tensors] or places[:1], name)
        else:
            found[name] = place
    if extra := sorted(source.tensors.keys() - {p.name for p in found.values()} - _NO_WEIGHTS):
        raise ModelError(f"{source.path} has the tensor {extra[0]}, which a model of {config.family} does not have")
    return found


def _candidates(config: ModelConfig, rename: Callable[[str], str], name: str, shape: Shape) -> Iterator[Place]:
    """Return where the tensor may be: experts stacked, or one by one in early files; fused; or by itself.

    Of mixtures the `gguf` package does not know dense layers: they have the names of dense models.
    """
    if (match := _EXPERT.fullmatch(name)) and config.experts:
        stem, layer, expert, part = match.groups()
        yield Place(rename(f"{stem}.{part}_proj.weight"), (config.experts.count, *shape), part=int(expert))
        yield Place(f"blk.{layer}.ffn_{part}.{expert}.weight", shape)
        return
    yield Place(rename(name), shape)
    if (match := _DENSE.fullmatch(name)) and config.experts:
        layer, part = match.groups()
        yield Place(f"blk.{layer}.ffn_{part}.weight", shape)
    for place in FAMILIES[config.family].places(config, name, shape):
        yield place._replace(name=rename(place.name))


def _renaming(source: GGUF) -> Callable[[str], str]:
    """Return a function from a tensor's name in Hugging Face checkpoints to its name in the file; "" for none."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    architecture = next(key for key, name in MODEL_ARCH_NAMES.items() if name == source.architecture)
    names = get_tensor_name_map(architecture, source.num_layers)
    return lambda name: names.get_name(name, (".weight", ".bias")) or ""


def _shape(source: GGUF, name: str) -> Shape:
    return tuple(int(n) for n in reversed(source.tensors[name].shape))


def _refuse(source: GGUF, places: Sequence[Place], name: str) -> None:
    place = places[0]
    if place.name in source.tensors:
        raise ModelError(
            f"{source.path}: {place.name} has the shape {list(_shape(source, place.name))}, not {list(place.shape)}"
        )
    raise ModelError(f"{source.path} lacks {place.name or name}")
