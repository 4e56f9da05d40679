"""What families with a mixture of experts share."""

from __future__ import annotations

import re
from collections.abc import Sequence

from daemon.models.architecture import ExpertsConfig, ModelConfig
from daemon.models.config_values import RawConfig, count
from daemon.models.families.family import Place, Shape
from daemon.models.files import ModelError

_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


def read_experts(config: RawConfig, key: str, *, width: int, normalise: bool) -> ExpertsConfig:
    """Return the mixture of a model whose number of experts is the value of `key`."""
    number, per_token = count(config, key), count(config, "num_experts_per_tok")
    if per_token > number:
        raise ModelError(f"num_experts_per_tok is {per_token}; the model has {number} experts ({key})")
    return ExpertsConfig(number, per_token, width, normalise)


def stacked_experts(config: ModelConfig, name: str, shape: Shape) -> Sequence[Place]:
    """Return the place of an expert's weight in a checkpoint that stacks all experts of a layer.

    Transformers 5 has them so in memory: gate and up as [experts, 2 * width, hidden], down as [experts, hidden,
    width].
    """
    match = _EXPERT.fullmatch(name)
    if match is None or config.experts is None:
        return ()
    at, expert, part = match.groups()
    number, (rows, columns) = config.experts.count, shape
    if part == "down":
        return (Place(f"{at}.down_proj", (number, *shape), 0, rows, int(expert)),)
    begin = 0 if part == "gate" else rows
    return (Place(f"{at}.gate_up_proj", (number, 2 * rows, columns), begin, begin + rows, int(expert)),)
