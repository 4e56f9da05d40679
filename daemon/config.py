"""The options of the daemon: type, default, unit, limits and description of each, declared once.

Precedence: defaults < TOML file < environment (`LLUMD_<NAME>`) < command line. `Config.origin` records the source of
each value; `llumctl config` shows it. llumctl imports this module, so it imports only what loads fast.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from daemon.enums import MigrationChoice
from daemon.http_options import HttpOptions
from daemon.option import MAX_TOKENS, ConfigError, Option, check_limits, parse
from daemon.option import declare as _option
from daemon.relations import MAX_ENGINES, check_relations, require
from daemon.toml_file import read_toml
from daemon.units import quoted

__all__ = ["MAX_ENGINES", "Config", "ConfigError", "Option", "load", "options"]

ENV_PREFIX = "LLUMD_"
_GROUPS = ("model", "engine", "scheduling", "http", "daemon")


@dataclass(slots=True)
class Config(HttpOptions):
    """The settings of the daemon. Sizes are in bytes and durations in seconds."""

    # -- model
    model: str = _option(
        "demo",
        "model",
        "Model to serve: `demo` (SmolLM2-135M-Instruct, downloaded once), a Hugging Face directory, a .gguf file, or "
        "a name on the Hugging Face hub: `ORG/NAME`, `ORG/NAME@REVISION`, or `ORG/NAME:FILE.gguf`.",
    )
    served_name: list[str] = _option(
        [],
        "model",
        "Names of the model in the API, separated by commas; answers have the first. Empty: `ORG/NAME` of the hub, "
        "the name of the model directory, or of the .gguf file without its suffix. The value of `model` also works.",
    )
    load_format: str = _option(
        "auto",
        "model",
        "Source of the weights. `auto`: the files of the model. `dummy`: seeded random weights; "
        "only config.json and the tokenizer are read.",
        choices=("auto", "dummy"),
    )
    max_model_len: int = _option(
        0,
        "model",
        "Maximum length of prompt plus output, at most the limit of the model. 0: the limit of the model.",
        "tokens",
        at_least=2,
        at_most=MAX_TOKENS,
        or_zero=True,
    )
    sanitize_control_tokens: bool = _option(
        True,
        "model",
        "Encode control tokens (`<|im_start|>`) that stand in chat messages as text, so that a message cannot end "
        "its turn and write another. `false`: they become the tokens.",
    )
    tool_format: str = _option(
        "auto",
        "model",
        "Form in which the model writes tool calls. `auto`: the form that its chat template shows; if it shows none, "
        "`json`, an object or a list of them. `none`: requests with tools are refused.",
        choices=("auto", "hermes", "llama3_json", "mistral", "json", "none"),
    )
    reasoning_format: str = _option(
        "auto",
        "model",
        "How the model marks its reasoning, which chats get apart from the answer. `think`: between `<think>` and "
        "`</think>`. `auto`: `think` if its chat template has these. `none`: reasoning is part of the text.",
        choices=("auto", "think", "none"),
    )
    # -- engines
    engine: str = _option(
        "model",
        "engine",
        "What an engine runs. `model`: the model. `stub`: no model; emits tokens at a fixed rate. `hash`: no model; "
        "each token is a hash of the KV blocks that the engine reads. Both are for benchmarks and fault tests. "
        "`script`: no model; plays the answers in the file `script`, for tests of clients.",
        choices=("model", "stub", "hash", "script"),
    )
    script: str = _option(
        "",
        "engine",
        'File with the answers of the `script` engine: JSON, a list of `{"when": REGEX, "say": TEXT}`. The first '
        "entry that is found in the text of a prompt is its answer; without `when` it fits every prompt.",
    )
    devices: list[str] = _option(
        [],
        "engine",
        "Devices, separated by commas; each entry starts one engine. All are `cpu` or all are `cuda:N`; a device may "
        "appear more than once. Empty: every visible GPU, or `cpu,cpu` if there is none.",
    )
    threads: int = _option(
        0,
        "engine",
        "Compute threads of each CPU engine, at most the CPUs that the daemon may use. 0: these CPUs are divided "
        "evenly between the engines.",
        at_least=0,
        at_most=4096,
    )
    dtype: str = _option(
        "auto",
        "engine",
        "Arithmetic of the linear layers. `auto`: on the CPU, the faster type in a test at startup; on GPUs, bf16, "
        "and FP8 for FP8 weights with a scale for each row or matrix. "
        "`fp32` is for the CPU only.",
        choices=("auto", "bf16", "fp32"),
    )
    deterministic: bool = _option(
        False,
        "engine",
        "Compute a request to the same bits in every batch. CPU only; uses fp32 and is slower.",
    )
    kv_memory: int = _option(
        0,
        "engine",
        "KV cache of each engine. 0: on the CPU, a quarter of the free memory divided between the engines, at most "
        "2 GiB each; on a GPU, what `memory_share` leaves after weights and activations.",
        "bytes",
        at_least=4 << 10,
        at_most=16 << 40,
        or_zero=True,
    )
    kv_dtype: str = _option(
        "auto",
        "engine",
        "Type of the KV cache. `auto`: the type that attention computes in. `fp8`: e4m3, GPUs only; "
        "twice the tokens in the same memory.",
        choices=("auto", "fp8"),
    )
    build: bool = _option(
        True,
        "engine",
        "On GPUs, compile missing kernels before the start: minutes, once; it needs a C++ compiler. `false`: refuse "
        "to start without them.",
    )
    memory_share: float = _option(
        0.9,
        "engine",
        "Fraction of the memory of a GPU that its engines use together for weights, activations and KV cache.",
        above=0,
        at_most=1,
    )
    block_size: int = _option(16, "engine", "Tokens in one KV block.", "tokens", choices=(8, 16, 32, 64, 128))
    max_num_seqs: int = _option(
        64,
        "engine",
        "Maximum number of requests in one batch of an engine. It is also never above `max_batch_tokens`.",
        "requests",
        gpu=256,
        at_least=1,
        at_most=8192,
    )
    max_batch_tokens: int = _option(
        256,
        "engine",
        "Maximum number of tokens that an engine computes in one step; also the largest prefill chunk.",
        "tokens",
        gpu=8192,
        at_least=1,
        at_most=1 << 20,
    )
    itl_target: float = _option(
        0.0,
        "engine",
        "Target for the inter-token latency: the time of a step that both decodes and prefills. "
        "Prefill chunks shrink to meet it. 0: no target.",
        "seconds",
        gpu=0.05,
        at_most=60,
    )
    prefix_caching: bool = _option(
        True, "engine", "Reuse KV blocks between requests whose prompts begin with the same tokens."
    )
    overlap: bool = _option(
        True,
        "engine",
        "Launch the next step before the tokens of the current step are known. GPUs only; no effect on the CPU.",
    )
    stub_step: float = _option(
        0.02, "engine", "Time of one step of the engines without a model.", "seconds", at_most=10
    )
    # -- scheduling
    policy: str = _option(
        "llumd",
        "scheduling",
        "How the freeness (free capacity) of engines is computed. `paper`: as in the Llumnix paper. `artifact`: as "
        "in the code published with the paper. `llumd`: from memory and compute.",
        choices=("llumd", "paper", "artifact"),
    )
    rebalance: bool = _option(
        True,
        "scheduling",
        "Move running requests between engines automatically. Draining an engine moves its requests even if false.",
    )
    rebalance_period: float = _option(
        0.2,
        "scheduling",
        "Time between two rounds of rebalancing and auto-scaling.",
        "seconds",
        at_least=0.01,
        at_most=10,
    )
    migrate_choice: str = _option(
        MigrationChoice.SHORTEST.value,
        "scheduling",
        "Which request moves first, of those with the lowest priority on an engine: the one with the fewest tokens "
        "(`shortest`), with the most tokens (`longest`) or admitted last (`last`).",
        choices=tuple(choice.value for choice in MigrationChoice),
    )
    prefix_affinity: bool = _option(
        True,
        "scheduling",
        "Among engines with similar freeness, prefer one that has probably cached the beginning of the prompt. "
        "Needs `prefix_caching`.",
    )
    headroom: bool = _option(
        True,
        "scheduling",
        "Keep an engine that holds a high-priority request lightly loaded. "
        "If false, high priority only puts a request first in the waiting queue.",
    )
    ideal_tokens: int = _option(
        0,
        "scheduling",
        "Size up to which an engine fills its KV cache while it holds a high-priority request; the rest is headroom. "
        "0: measured when the engine starts.",
        "tokens",
        at_least=0,
        at_most=1 << 30,
    )
    min_engines: int = _option(
        0,
        "scheduling",
        "Minimum number of engines that auto-scaling keeps serving; it parks idle engines above it. "
        "0: auto-scaling is off.",
        "engines",
        at_least=0,
        at_most=MAX_ENGINES,
    )
    max_engines: int = _option(
        0,
        "scheduling",
        "Maximum number of engines that auto-scaling lets serve. 0: all engines.",
        "engines",
        at_least=0,
        at_most=MAX_ENGINES,
    )
    max_resumes: int = _option(
        1,
        "scheduling",
        "Number of engine crashes after which a request continues on another engine. After one more crash it ends "
        "with an error, because the request itself may be the cause.",
        at_least=0,
        at_most=100,
    )
    scale_period: float = _option(
        10.0,
        "scheduling",
        "How long the load must stay past a threshold before auto-scaling wakes or parks an engine.",
        "seconds",
    )
    # -- daemon
    run_dir: str = _option(
        "",
        "daemon",
        "Directory of the admin socket. Empty: $RUNTIME_DIRECTORY (systemd), $XDG_RUNTIME_DIR/llumd, "
        "/run/llumd (root) or /tmp/llumd-UID, the first that applies.",
    )
    drain_timeout: float = _option(
        30.0, "daemon", "Time that running requests have to finish after SIGTERM.", "seconds"
    )
    load_timeout: float = _option(
        600.0,
        "daemon",
        "Time that an engine has to load its model. `hang_timeout` later it is killed and started again.",
        "seconds",
        at_least=1,
    )
    hang_timeout: float = _option(
        30.0,
        "daemon",
        "A process that misses its own deadline by this time is killed and started again. An engine that misses it "
        "gets no new requests at once, and soon its requests continue on other engines.",
        "seconds",
    )
    log_level: str = _option(
        "info", "daemon", "Lowest level of log messages.", choices=("debug", "info", "warning", "error")
    )

    origin: dict[str, str] = field(default_factory=dict, metadata={"group": ""})

    def replace(self, values: Mapping[str, Any], origin: str) -> Config:
        """Return a copy with `values`, which are strings or TOML values, parsed and set.

        `origin` names their source. Raises ConfigError for unknown names and values that cannot be parsed.
        """
        known = {f.name: f for f in options()}
        parsed: dict[str, Any] = {}
        for raw_name, raw in values.items():
            name = raw_name.replace("-", "_")
            if name not in known:
                why = f"unknown option {quoted(raw_name)} ({origin}); `llumd serve --help` lists all options"
                raise ConfigError(why)
            try:
                parsed[name] = parse(known[name], _TYPES[name], raw)
            except ValueError as e:
                raise ConfigError(f"{name} ({origin}): {e}") from None
        return dataclasses.replace(self, **parsed, origin=self.origin | dict.fromkeys(parsed, origin))

    @property
    def main_name(self) -> str:
        """The name of the model that answers have; "" if no option sets one and the model is not resolved yet."""
        return self.served_name[0] if self.served_name else ""

    @property
    def on_gpus(self) -> bool:
        """True if engines compute on GPUs. Engines without a model compute nothing, whatever `devices` is."""
        return self.engine == "model" and any(d != "cpu" for d in self.devices)

    def for_gpus(self) -> Config:
        """Return a copy with the GPU defaults for every option that no source has set."""
        own = {o.name: o.metadata["gpu"] for o in options() if o.metadata["gpu"] is not None}
        return dataclasses.replace(self, **{name: v for name, v in own.items() if name not in self.origin})

    def check(self) -> None:
        """Check the limits of each option, then the options that depend on each other. Raises ConfigError."""
        for option in options():
            try:
                check_limits(option, getattr(self, option.name))
            except ValueError as e:
                require(self, False, option.name, str(e))
        check_relations(self)


def options() -> list[Option]:
    """Return all options, by group, in the order of their declaration."""
    declared = [f for f in dataclasses.fields(Config) if f.name != "origin"]
    return sorted(declared, key=lambda option: _GROUPS.index(option.metadata["group"]))


_TYPES: dict[str, Any] = get_type_hints(Config)


def load(flags: Mapping[str, Any], file: Path | None, environ: Mapping[str, str] = os.environ) -> Config:
    """Return the settings from all sources, checked. `flags` has only the options that the command line sets.

    Raises ConfigError, which names the option and its source.
    """
    config = Config()
    if file is not None:
        config = config.replace(read_toml(file), str(file))
    names = {option.name for option in options()}
    for variable, value in environ.items():
        name = variable.removeprefix(ENV_PREFIX).lower()
        if variable.startswith(ENV_PREFIX) and name in names:
            config = config.replace({name: value}, f"environment {ENV_PREFIX}{name.upper()}")
    config = config.replace(flags, "command line")
    (config.for_gpus() if config.on_gpus else config).check()  # with the defaults that engines on GPUs will have
    return config
