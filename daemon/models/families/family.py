"""What a file in this folder gives: a `Family`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from daemon.models.architecture import LayerConfig, ModelConfig, RopeConfig
from daemon.models.config_values import RawConfig, count
from daemon.models.files import ModelError
from daemon.models.rope_config import read_rope

Shape = tuple[int, ...]

_COMPUTED = ("rotary_emb.inv_freq",)  # computed from the config instead, as Transformers does


class Place(NamedTuple):
    """Where a checkpoint has a canonical tensor: the rows `begin` to `end` of its tensor `name`, of shape `shape`.

    `part`: the index of the part that has these rows, if `name` stacks several; None if it does not.
    `end` None: all rows.
    """

    name: str
    shape: Shape
    begin: int = 0
    end: int | None = None
    part: int | None = None


def _no_places(config: ModelConfig, name: str, shape: Shape) -> Sequence[Place]:
    return ()


def one_rope(config: RawConfig, head_dim: int) -> tuple[RopeConfig, ...]:
    """Return the rotary embedding of a family whose layers all have the same one, and rotate whole heads."""
    return (read_rope(config, head_dim),)


@dataclass(frozen=True, slots=True)
class Family:
    """A family of models, as it differs from the common decoder (`ModelConfig`, whose defaults are Llama's).

    `architectures`: the names in config.json. `defaults`: values of Transformers for keys that config.json may lack,
    where they are not those of Llama. `describe(base, config)` returns `base`, which has the counts, ropes and ends,
    with what differs; `layers` of `base` have full attention and the first rope. `places(config, name, shape)`
    returns where a checkpoint may have the tensor with the canonical name `name` and `shape`, beside that name; the
    first that exists is used. `ignored`: beginnings of the names of tensors that are not needed. `text_config`: the
    key of the object in config.json that describes the language model, for models that also see or hear.

    `describe` and `ropes` raise ModelError, with the key, for what the engines do not compute.
    """

    name: str
    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    describe: Callable[[ModelConfig, RawConfig], ModelConfig]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    ropes: Callable[[RawConfig, int], tuple[RopeConfig, ...]] = one_rope
    places: Callable[[ModelConfig, str, Shape], Sequence[Place]] = _no_places
    ignored: tuple[str, ...] = ()
    text_config: str = ""

    def ignores(self, name: str) -> bool:
        """Return True if the tensor `name` of a checkpoint is not needed."""
        return name.endswith(_COMPUTED) or name.startswith(self.ignored)


def windowed_layers(
    config: RawConfig, num_layers: int, window: int, default: Callable[[int], bool], *, local_rope: int = 0
) -> tuple[LayerConfig, ...]:
    """Return layers with full attention, or with a sliding window of `window` tokens and the rope `local_rope`.

    `layer_types` in config.json says which; without it, a layer i slides if ``default(i)``. `window` 0: none does.
    """
    types = config.get("layer_types")
    if types is None:
        slides = [bool(window) and default(i) for i in range(num_layers)]
    else:
        if not isinstance(types, list) or len(types) != num_layers:
            raise ModelError(f"layer_types must be a list of num_hidden_layers ({num_layers}) names")
        if unknown := set(map(str, types)) - {"full_attention", "sliding_attention"}:
            raise ModelError(
                f"layer_types has {min(unknown)!r}; supported are 'full_attention' and 'sliding_attention'"
            )
        slides = [kind == "sliding_attention" for kind in types]
        if any(slides) and not window:
            raise ModelError("layer_types has sliding_attention, but sliding_window is not set")
    return tuple(LayerConfig(window, local_rope) if slide else LayerConfig() for slide in slides)


def window_of(config: RawConfig, key: str = "sliding_window") -> int:
    """Return the sliding window in tokens; 0 if `key` is missing or null."""
    return 0 if config.get(key) is None else count(config, key)
