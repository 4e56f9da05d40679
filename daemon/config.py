"""Every option of the daemon: its default, unit and meaning, in one place.

Precedence: defaults < TOML file < environment (``LLUMD_<NAME>``) < command-line flags.
`origin` remembers where each value came from, so that ``llumctl config`` can prove it.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from daemon.enums import MigrationChoice

ENV_PREFIX = "LLUMD_"

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SECONDS = {"ms": 1e-3, "s": 1.0, "": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


class ConfigError(ValueError):
    """A setting that cannot be used; the message names the option and says what to do."""


def parse_size(text: str | int) -> int:
    """Bytes from ``2GiB``, ``512M``, ``1.5g`` or a plain number (k/M/G are decimal, Ki/Mi/Gi binary)."""
    if isinstance(text, int):
        return text
    m = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*((?:[kmgt]i?)?)b?\s*", str(text).lower())
    if not m:
        raise ConfigError(f"not a size: {text!r}; write for example 512MiB, 2GiB or a number of bytes")
    return int(float(m[1]) * _UNITS[m[2]])


def parse_seconds(text: str | float) -> float:
    """Seconds from ``30``, ``30s``, ``250ms``, ``5m`` or ``1h``."""
    if isinstance(text, int | float):
        return float(text)
    m = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(ms|s|m|min|h|)\s*", str(text).lower())
    if not m:
        raise ConfigError(f"not a duration: {text!r}; write for example 30s, 250ms or 5m")
    return float(m[1]) * _SECONDS[m[2]]


def _opt(
    default: Any, group: str, meaning: str, unit: str = "", choices: tuple[str, ...] = (), gpu: Any = None
) -> Any:
    """`gpu`: the default where engines compute on GPUs, if it is another one there."""
    meta = {"group": group, "meaning": meaning, "unit": unit, "choices": choices, "gpu": gpu}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=meta)
    return field(default=default, metadata=meta)


@dataclass(slots=True)
class Config:
    """The daemon's settings. Sizes are bytes, durations seconds, after parsing."""

    # -- model
    model: str = _opt("demo", "model", "what to serve: `demo`, a Hugging Face directory or a .gguf file")
    served_name: str = _opt("", "model", "model name clients use; default: the model's own")
    load_format: str = _opt(
        "auto", "model", "`dummy` makes seeded random weights from config.json alone", choices=("auto", "dummy")
    )
    max_model_len: int = _opt(0, "model", "longest prompt plus output; 0: what the model allows", "tokens")
    # -- engines
    engine: str = _opt(
        "model",
        "engine",
        "`stub` emits at a set rate, `hash` hashes what it read: "
        "both without a model, for benchmarks and fault tests",
        choices=("model", "stub", "hash"),
    )
    devices: list[str] = _opt(
        [],
        "engine",
        "one engine each: all `cpu` or all `cuda:N`; a device may be named twice; "
        "default: every GPU there is, else `cpu,cpu`",
    )
    threads: int = _opt(0, "engine", "compute threads of one CPU engine; 0: cores shared out evenly")
    dtype: str = _opt(
        "auto",
        "engine",
        "arithmetic of the linear layers; auto: whichever a self-test finds faster (CPU), bf16 (GPU)",
        choices=("auto", "bf16", "fp32"),
    )
    deterministic: bool = _opt(False, "engine", "same bits whatever else is in the batch (CPU, fp32, slower)")
    kv_memory: int = _opt(
        0,
        "engine",
        "KV pool of one engine; 0: a quarter of the free memory, shared out, at most 2 GiB each (CPU), "
        "or what `memory_share` leaves (GPU)",
        "bytes",
    )
    kv_dtype: str = _opt(
        "auto",
        "engine",
        "how KV is kept; auto: as the engine computes; fp8: e4m3, twice the tokens in a GPU's memory",
        choices=("auto", "fp8"),
    )
    memory_share: float = _opt(
        0.9, "engine", "share of a GPU's memory that its engines take together, for weights, activations and KV"
    )
    block_size: int = _opt(16, "engine", "tokens in a KV block", "tokens")
    max_num_seqs: int = _opt(64, "engine", "requests in one batch", "requests", gpu=256)
    max_batch_tokens: int = _opt(
        256, "engine", "tokens computed in one step; bounds a prefill chunk", "tokens", gpu=8192
    )
    itl_target: float = _opt(
        0.0,
        "engine",
        "longest that a step should take which decodes for some requests and prefills for others: "
        "its chunks shrink to fit; 0: no limit",
        "seconds",
        gpu=0.05,
    )
    prefix_caching: bool = _opt(True, "engine", "reuse the KV blocks of equal prompt beginnings")
    overlap: bool = _opt(
        True, "engine", "launch the next step before the last one's tokens are known, where a device can (no CPU)"
    )
    stub_step: float = _opt(0.02, "engine", "step time of the stub and hash engines", "seconds")
    # -- scheduling
    policy: str = _opt(
        "llumd",
        "scheduling",
        "how engines are compared: `paper` and `artifact` are Llumnix's two, `llumd` also judges compute",
        choices=("llumd", "paper", "artifact"),
    )
    rebalance: bool = _opt(True, "scheduling", "move running requests between engines by themselves")
    rebalance_period: float = _opt(0.2, "scheduling", "time between two looks at the boards", "seconds")
    migrate_choice: str = _opt(
        MigrationChoice.SHORTEST.value,
        "scheduling",
        "which running request moves first",
        choices=tuple(choice.value for choice in MigrationChoice),
    )
    prefix_affinity: bool = _opt(
        True, "scheduling", "among engines about equally free prefer one that holds the prompt's beginning"
    )
    headroom: bool = _opt(
        True,
        "scheduling",
        "keep an engine with a request of high priority lightly loaded; else such requests only go first",
    )
    ideal_tokens: int = _opt(
        0,
        "scheduling",
        "KV up to which an engine is filled while it has a request of high priority (the rest is headroom); "
        "0: measured at start",
        "tokens",
    )
    min_engines: int = _opt(
        0, "scheduling", "idle engines are parked down to so many; 0: auto-scaling is off", "engines"
    )
    max_engines: int = _opt(0, "scheduling", "most engines that auto-scaling lets serve; 0: all", "engines")
    max_resumes: int = _opt(
        1, "scheduling", "how often a request goes on elsewhere after its engine has died; "
        "then it ends with an error, for it may be what kills them",
    )  # fmt: skip
    scale_period: float = _opt(
        10.0, "scheduling", "time for which load must call for an engine more or less before one is woken or parked",
        "seconds",
    )  # fmt: skip
    # -- frontend
    host: str = _opt("127.0.0.1", "http", "address to listen on")
    port: int = _opt(8000, "http", "port to listen on; 0: any free one")
    frontends: int = _opt(1, "http", "HTTP processes, all on one listener")
    api_key_file: str = _opt("", "http", "file with one API key a line; empty: no key is asked for")
    allow_unauthenticated: bool = _opt(False, "http", "permit a non-loopback host without API keys")
    max_body: int = _opt(8 << 20, "http", "largest request body (413 above)", "bytes")
    max_prompt_tokens: int = _opt(0, "http", "longest prompt; 0: what the model allows", "tokens")
    max_output_tokens: int = _opt(4096, "http", "output limit where a request names none", "tokens")
    max_queued: int = _opt(512, "http", "unfinished requests of one frontend (429 above)", "requests")
    max_choices: int = _opt(8, "http", "largest `n`", "choices")
    request_deadline: float = _opt(600.0, "http", "longest life of a request; then it ends with an error", "seconds")
    journal_memory: int = _opt(64 << 20, "http", "journal of one frontend: prompts and outputs in flight", "bytes")
    heartbeat: float = _opt(0.0, "http", "SSE comment after that much silence; 0: none", "seconds")
    # -- daemon
    run_dir: str = _opt("", "daemon", "holds the admin socket; default $XDG_RUNTIME_DIR/llumd, or /run/llumd")
    drain_timeout: float = _opt(30.0, "daemon", "SIGTERM: how long running requests may go on", "seconds")
    load_timeout: float = _opt(600.0, "daemon", "how long an engine may take to load", "seconds")
    hang_timeout: float = _opt(60.0, "daemon", "an engine this long past its own deadline is killed", "seconds")
    log_level: str = _opt("info", "daemon", "what is logged", choices=("debug", "info", "warning", "error"))

    origin: dict[str, str] = field(default_factory=dict, metadata={"group": ""})

    def replace(self, values: Mapping[str, Any], origin: str) -> Config:
        """A copy with `values` (strings or TOML values) parsed and set; unknown names are refused."""
        known = {f.name: f for f in options()}
        parsed: dict[str, Any] = {}
        for raw_name, raw in values.items():
            name = raw_name.replace("-", "_")
            if name not in known:
                raise ConfigError(f"unknown option {raw_name!r} ({origin}); `llumd serve --help` lists them")
            try:
                parsed[name] = _parse(known[name], raw)
            except (ConfigError, ValueError, TypeError) as e:
                raise ConfigError(f"{name} ({origin}): {e}") from None
        return dataclasses.replace(self, **parsed, origin=self.origin | dict.fromkeys(parsed, origin))

    @property
    def on_gpus(self) -> bool:
        """Whether engines compute on GPUs; engines without a model compute nothing on whatever is named."""
        return self.engine == "model" and any(d != "cpu" for d in self.devices)

    def for_gpus(self) -> Config:
        """The same with GPUs' own defaults for what nobody has set."""
        own = {o.name: o.metadata["gpu"] for o in options() if o.metadata["gpu"] is not None}
        return dataclasses.replace(self, **{name: v for name, v in own.items() if name not in self.origin})

    def check(self) -> None:
        """Refuse what cannot work, before anything starts."""
        _require(self.block_size in (8, 16, 32, 64, 128), "block_size", "must be 8, 16, 32, 64 or 128")
        for name in ("max_num_seqs", "max_batch_tokens", "frontends"):
            _require(getattr(self, name) >= 1, name, "must be at least 1")
        for name in ("max_queued", "max_choices", "max_output_tokens"):
            _require(getattr(self, name) >= 1, name, "must be at least 1")
        whole = ("threads", "kv_memory", "max_model_len", "max_prompt_tokens", "port")
        for name in (*whole, "ideal_tokens", "min_engines", "max_engines", "max_resumes"):
            _require(getattr(self, name) >= 0, name, "must not be negative")
        for option in options():
            if option.metadata["unit"] == "seconds":
                _require(0 <= getattr(self, option.name) < math.inf, option.name, "must be finite and not negative")
        _require(self.port <= 65535, "port", "must be at most 65535")
        _require(self.frontends <= 16, "frontends", "must be at most 16")
        _require(len(self.devices) <= 64, "devices", "names more than 64 engines")
        self._check_scaling()
        _require(self.max_body >= 1024, "max_body", "must be at least 1 KiB")
        _require(1 << 20 <= self.journal_memory < 4 << 30, "journal_memory", "must be from 1 MiB to below 4 GiB")
        self._check_devices()
        if self.host not in ("127.0.0.1", "::1", "localhost") and not self.api_key_file:
            _require(
                self.allow_unauthenticated,
                "host",
                f"{self.host} is reachable from other machines: set api_key_file, "
                "or allow_unauthenticated if anyone who can connect may use the model",
            )

    def _check_devices(self) -> None:
        for d in self.devices:
            _require(bool(re.fullmatch(r"cpu|cuda:\d+", d)), "devices", f"{d!r} is neither `cpu` nor `cuda:N`")
        mixed = "cpu" in self.devices and any(d != "cpu" for d in self.devices)
        _require(not mixed, "devices", "`cpu` and `cuda:N` do not go together: no request could move between them")
        _require(0 < self.memory_share <= 1, "memory_share", "must be above 0 and at most 1")
        if self.on_gpus:
            _require(self.dtype != "fp32", "dtype", "GPUs compute in bf16: choose auto or bf16")
            _require(not self.deterministic, "deterministic", "is for the CPU: a GPU's rounding depends on the batch")
        elif self.devices and self.engine == "model":
            _require(self.kv_dtype == "auto", "kv_dtype", "fp8 is for GPUs; on the CPU choose auto")

    def _check_scaling(self) -> None:
        """`devices` may be empty before the default is known; then the rest is checked once more."""
        if self.devices:
            for name in ("min_engines", "max_engines"):
                why = f"must be at most {len(self.devices)}: there is one engine for each entry of `devices`"
                _require(getattr(self, name) <= len(self.devices), name, why)
        if self.max_engines:
            why = f"must not be above max_engines, {self.max_engines}"
            _require(self.min_engines <= self.max_engines, "min_engines", why)


def options() -> list[dataclasses.Field[Any]]:
    """The options, in the order of the class."""
    return [f for f in dataclasses.fields(Config) if f.name != "origin"]


def _require(ok: bool, name: str, why: str) -> None:
    if not ok:
        raise ConfigError(f"{name}: {why}")


def _parse(option: dataclasses.Field[Any], raw: Any) -> Any:
    kind = _TYPES[option.name]
    choices = option.metadata["choices"]
    if choices and raw not in choices:
        raise ConfigError(f"{raw!r} is not one of {', '.join(choices)}")
    if kind == list[str]:
        return [p.strip() for p in raw.split(",") if p.strip()] if isinstance(raw, str) else [str(p) for p in raw]
    if kind is bool:
        return _parse_bool(raw)
    if isinstance(raw, bool) and kind is not str:
        raise ConfigError(f"{raw!r} is not a number")
    if option.metadata["unit"] == "bytes":
        return parse_size(raw)
    if option.metadata["unit"] == "seconds":
        return parse_seconds(raw)
    if kind is int and isinstance(raw, float):
        raise ConfigError(f"{raw!r} is not a whole number")
    return kind(raw)


def _parse_bool(raw: Any) -> bool:
    if isinstance(raw, bool):
        return raw
    words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if str(raw).lower() not in words:
        raise ConfigError(f"{raw!r} is neither true nor false")
    return words[str(raw).lower()]


_TYPES: dict[str, Any] = get_type_hints(Config)


def load(flags: Mapping[str, Any], file: Path | None, environ: Mapping[str, str] = os.environ) -> Config:
    """Settings from all sources. `flags` holds only what the command line named.

    Raises ConfigError naming the option and its source.
    """
    config = Config()
    if file is not None:
        config = config.replace(_read_toml(file), str(file))
    env = {k[len(ENV_PREFIX) :].lower(): v for k, v in environ.items() if k.startswith(ENV_PREFIX)}
    names = {f.name for f in options()}
    for name, value in env.items():
        if name in names:
            config = config.replace({name: value}, f"environment {ENV_PREFIX}{name.upper()}")
    config = config.replace(flags, "command line")
    config.check()
    return config


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text())
    except OSError as e:
        raise ConfigError(f"cannot read {file}: {e.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigError(f"{file} is not valid TOML: {e}") from None


def cache_dir() -> Path:
    """Where converted models and compiled kernels are kept: $LLUMD_CACHE, $CACHE_DIRECTORY (systemd) or ~/.cache."""
    for name in ("LLUMD_CACHE", "CACHE_DIRECTORY"):
        if os.environ.get(name):
            return Path(os.environ[name])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llumd"


def run_dir(config: Config | None = None) -> Path:
    """Where the admin socket lives."""
    if config is not None and config.run_dir:
        return Path(config.run_dir)
    if os.environ.get("RUNTIME_DIRECTORY"):
        return Path(os.environ["RUNTIME_DIRECTORY"])
    if os.environ.get("XDG_RUNTIME_DIR"):
        return Path(os.environ["XDG_RUNTIME_DIR"]) / "llumd"
    return Path("/run/llumd") if os.geteuid() == 0 else Path(f"/tmp/llumd-{os.getuid()}")
