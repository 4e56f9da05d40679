"""What an engine computes with: two numbers that say which other engines can go on with its work."""

from __future__ import annotations

import dataclasses
from hashlib import blake2b
from typing import NamedTuple

import msgspec

from daemon.config import Config
from daemon.engine.runner import PoolSpec
from daemon.models.model_config import ModelConfig

_NO_MEANING = ("path", "name")  # fields of a ModelConfig that change no result


class Identity(NamedTuple):
    """Equal `weights`: another engine may recompute a request's KV, and goes on with its output.

    Equal `fingerprint`: it may also use the KV itself. That takes the weights, the same arithmetic, and blocks of the
    same form. Both are 64 bits, never 0.
    """

    weights: int
    fingerprint: int


def identify(
    config: Config, model: ModelConfig, digest: bytes, spec: PoolSpec, device: str, arithmetic: str = ""
) -> Identity:
    """Return the identity of an engine on `device`. `digest`: of its weight files; empty if it reads none.

    `arithmetic`: that of its products, see `Runner`.
    """
    architecture = {k: v for k, v in dataclasses.asdict(model).items() if k not in _NO_MEANING}
    source = config.load_format if config.engine == "model" else config.engine
    weights = _number([source, digest.hex(), architecture])
    kind, _, _ = device.partition(":")  # the kernels of a CPU round differently than those of a GPU
    computation = [kind, arithmetic, config.dtype, config.kv_dtype, config.deterministic]
    return Identity(weights, _number([weights, computation, spec._replace(num_blocks=0)]))


def _number(value: object) -> int:
    text = msgspec.json.encode(value, order="deterministic")
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little") or 1
