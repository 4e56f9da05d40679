"""What `llumd check` tells about a model: what it is, how much memory it needs, how long a context fits."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec

from daemon.cli.memory_budget import arithmetic_of, engine_bytes, keeps_fp8, kv_token_bytes, loaded_bytes
from daemon.cli.prepare import Prepared
from daemon.models import store
from daemon.models.files import read_json
from daemon.models.loader import stored_bytes
from daemon.models.model_config import ModelConfig
from daemon.models.special_tokens import added_tokens
from daemon.models.template_files import DEFAULT, read_templates, tool_format


class Memory(msgspec.Struct):
    """Sizes in bytes, each for one engine."""

    weights: int  # after they are loaded, so dequantised
    dtype: str  # of the linear layers' weights
    kv_per_token: int
    kv_pool: int | None  # None: a GPU engine measures it at its start
    kv_longest: int  # what the longest context of the model needs
    engine: int | None  # a CPU engine besides its KV pool


class Context(msgspec.Struct):
    """Lengths in tokens."""

    model: int  # limit of the model
    served: int | None  # longest sequence with these settings; None as above
    fits: int | None  # longest sequence if all free memory is KV cache


class ModelReport(msgspec.Struct):
    """Facts about a model on this machine, with these settings."""

    name: str
    path: str
    family: str
    architecture: str
    layers: int
    parameters: int
    active_parameters: int
    quantisation: str  # of the files; "" for none
    dequantised: bool  # when they are loaded
    weights_on_disk: int  # bytes
    memory: Memory
    context: Context
    chat_templates: list[str]
    tool_format: str
    end_tokens: dict[int, str]
    engines: int
    free_memory: int  # bytes


def describe(prepared: Prepared, free_memory: int) -> ModelReport:
    """Return the report. `free_memory`: bytes of the machine."""
    config, model, path = prepared.config, prepared.model_config, prepared.model_dir
    raw = read_json(path / "config.json") or {}
    templates = read_templates(path)
    texts = {i: text for text, i in added_tokens(path).items()}
    architectures = raw.get("architectures") or [raw.get("model_type")]
    return ModelReport(
        name=model.name,
        path=str(path),
        family=model.family,
        architecture=str(architectures[0]),
        layers=model.num_layers,
        parameters=model.num_params,
        active_parameters=model.active_params,
        quantisation=_quantisation(model, path),
        dequantised=bool(model.quantisation) and not keeps_fp8(config, model, prepared.hardware),
        weights_on_disk=stored_bytes(path),
        memory=_memory(prepared),
        context=_context(prepared, free_memory),
        chat_templates=sorted(templates, key=lambda name: (name != DEFAULT, name)),
        tool_format=tool_format(templates),
        end_tokens={i: texts.get(i, "") for i in model.eos_token_ids},
        engines=len(config.devices),
        free_memory=free_memory,
    )


def lines(report: ModelReport) -> list[str]:
    """Return the report as text."""
    memory, context = report.memory, report.context
    active = f", {_billions(report.active_parameters)} for each token" if _is_mixture(report) else ""
    templates = ", ".join(report.chat_templates) or "none: only /v1/completions works"
    tools = {"": "none in the chat template", "other": "not known"}.get(report.tool_format, report.tool_format)
    ends = ", ".join(f"{i} {text}".strip() for i, text in report.end_tokens.items()) or "none known"
    each = " for each engine" if report.engines > 1 else ""
    weights = f"{_gib(memory.weights)} of weights in {memory.dtype}{each}"
    facts = {
        "family": f"{report.family} ({report.architecture}), {report.layers} layers",
        "parameters": f"{_billions(report.parameters)}{active}",
        "files": f"{report.path}, {_gib(report.weights_on_disk)} of weights",
        "quantisation": _quantisation_line(report),
        "memory": f"{weights}, {memory.kv_per_token / 1024:.4g} KiB of KV a token",
        "context": _context_line(context, memory),
        "chat template": templates,
        "tool format": tools,
        "end tokens": ends,
    }
    width = max(map(len, facts))
    return [report.name, *(f"  {name.ljust(width)}  {text}" for name, text in facts.items())]


def to_json(report: ModelReport) -> str:
    """Return the report as JSON."""
    return json.dumps(msgspec.to_builtins(report, str_keys=True), indent=1)


def _memory(prepared: Prepared) -> Memory:
    config, model = prepared.config, prepared.model_config
    token = kv_token_bytes(config, model, prepared.hardware)
    return Memory(
        weights=loaded_bytes(config, model, prepared.hardware),
        dtype="fp8" if keeps_fp8(config, model, prepared.hardware) else arithmetic_of(config, prepared.hardware),
        kv_per_token=token,
        kv_pool=None if config.on_gpus else prepared.pool_bytes,
        kv_longest=token * model.max_position,
        engine=None if config.on_gpus else engine_bytes(config, model, prepared.hardware),
    )


def _context(prepared: Prepared, free_memory: int) -> Context:
    config, model = prepared.config, prepared.model_config
    if config.on_gpus or config.engine != "model":
        return Context(model=model.max_position, served=None, fits=None)
    token = kv_token_bytes(config, model, prepared.hardware) * config.block_size
    room = free_memory // len(config.devices) - engine_bytes(config, model, prepared.hardware)
    limit = config.max_model_len or model.max_position
    blocks = prepared.pool_bytes // token, max(0, room) // token
    served, fits = (min(limit, n * config.block_size) for n in blocks)
    return Context(model=model.max_position, served=served, fits=max(served, fits))


def _context_line(context: Context, memory: Memory) -> str:
    if context.served is None or context.fits is None:
        return f"{context.model} tokens, which need {_gib(memory.kv_longest)} of KV cache"
    if context.served == context.model:
        return f"{context.model} tokens, the limit of the model"
    more = f"; up to {context.fits} fit with a larger kv_memory" if context.fits > context.served else ""
    return f"{context.served} of the model's {context.model} tokens with these settings{more}"


def _quantisation_line(report: ModelReport) -> str:
    if report.dequantised:
        return f"{report.quantisation}, dequantised to {report.memory.dtype} when loaded"
    return report.quantisation or "none"


def _quantisation(model: ModelConfig, path: Path) -> str:
    if model.quantisation:
        return str(model.quantisation.get("quant_method"))
    try:
        return f"none; converted from {store.source_file(path).read_text()}"
    except OSError:
        return ""


def _is_mixture(report: ModelReport) -> bool:
    return report.active_parameters != report.parameters


def _billions(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 10**9 else f"{number / 1e6:.1f} million"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
