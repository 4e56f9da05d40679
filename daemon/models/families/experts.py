"""Where checkpoints have the weights of experts; shared by families with a mixture of experts."""

from __future__ import annotations

import re
from collections.abc import Sequence

from daemon.models.architecture import ModelConfig
from daemon.models.families.family import Place, Shape

_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


def stacked_experts(config: ModelConfig, name: str, shape: Shape) -> Sequence[Place]:
    """Return the place of an expert's weight in a checkpoint that stacks all experts of a layer.

    Transformers 5 has them so in memory: gate and up as [experts, 2 * width, hidden], down as [experts, hidden,
    width].
    """
    match = _EXPERT.fullmatch(name)
    if match is None or config.experts is None:
        return ()
    at, expert, part = match.groups()
    count, (rows, columns) = config.experts.count, shape
    if part == "down":
        return (Place(f"{at}.down_proj", (count, *shape), 0, rows, int(expert)),)
    begin = 0 if part == "gate" else rows
    return (Place(f"{at}.gate_up_proj", (count, 2 * rows, columns), begin, begin + rows, int(expert)),)
