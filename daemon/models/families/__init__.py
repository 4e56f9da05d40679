"""The families of models, one file each. ARCHITECTURE.md says how to add one."""

from __future__ import annotations

from typing import Any

from daemon.models.families.family import Family as Family
from daemon.models.families.family import Place as Place
from daemon.models.families.family import Shape as Shape
from daemon.models.families.gemma2 import GEMMA2
from daemon.models.families.gemma3 import GEMMA3
from daemon.models.families.granite import GRANITE
from daemon.models.families.llama import LLAMA
from daemon.models.families.mistral import MISTRAL
from daemon.models.families.mixtral import MIXTRAL
from daemon.models.families.olmo2 import OLMO2
from daemon.models.families.phi3 import PHI3
from daemon.models.families.qwen2 import QWEN2
from daemon.models.families.qwen3 import QWEN3
from daemon.models.families.qwen3_moe import QWEN3_MOE
from daemon.models.files import ModelError

_ALL = (LLAMA, MISTRAL, QWEN2, QWEN3, QWEN3_MOE, MIXTRAL, GEMMA2, GEMMA3, PHI3, GRANITE, OLMO2)
FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}


def family_of(config: dict[str, Any]) -> Family:
    """Return the family that config.json names by `architectures`, or else by `model_type`. Raises ModelError."""
    named, model_type = config.get("architectures"), config.get("model_type")
    architecture = str(named[0]) if isinstance(named, list) and len(named) == 1 else ""
    for family in FAMILIES.values():
        if architecture in family.architectures or (not architecture and model_type in family.model_types):
            return family
    known = ", ".join(name for family in FAMILIES.values() for name in family.architectures)
    if named is None:
        raise ModelError(
            f"architectures is missing, and model_type {model_type!r} is not known; supported are {known}"
        )
    raise ModelError(f"architectures: {architecture or named} is not supported; supported are {known}")
