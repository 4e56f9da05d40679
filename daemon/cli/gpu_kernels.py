"""Kernels of a configuration before its start: those that are missing are compiled, or the start is refused."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import cast

from daemon.cli.commands import command
from daemon.cli.devices import Gpus
from daemon.config import Config, ConfigError
from daemon.engine.cuda import compile as kernel_compiler
from daemon.engine.cuda import kernels, toolkit
from daemon.engine.cuda.kernels import KernelError, KernelSpec, KvDtype
from daemon.models.model_config import ModelConfig

Missing = dict[str, list[KernelSpec]]  # architecture -> kernels


def missing_kernels(config: Config, model_config: ModelConfig, gpus: Gpus) -> Missing:
    """Return the kernels to compile before the start. Raises ConfigError if they are missing and may not be compiled.

    If nvidia-smi does not tell the architecture, each engine checks its kernels itself, before it loads the model.
    """
    specs = {arch: _required(config, model_config, arch) for arch in sorted(gpus.archs)}
    try:
        if config.build:
            cuda = toolkit.torch_cuda_version()
            absent = {arch: kernels.missing(wanted, kernels.directory(arch), cuda) for arch, wanted in specs.items()}
            return {arch: wanted for arch, wanted in absent.items() if wanted}
        if len(specs) == 1:  # of different GPUs only some may be visible, and only CUDA knows which
            for arch, wanted in specs.items():
                kernels.check(wanted, arch, build_command=_build_command(config))
    except KernelError as e:
        raise ConfigError(str(e)) from None
    return {}


def check_tools(missing: Missing, progress: Callable[[str], None]) -> None:
    """Check that `missing` can be compiled here, and say that a start does it. Raises ConfigError."""
    _check_tools(missing)
    progress(f"llumd: {_count(missing)}; `llumd serve` compiles them before it starts: minutes, once")


def build_kernels(missing: Missing, progress: Callable[[str], None]) -> None:
    """Compile `missing`. A second daemon that starts meanwhile waits for it. Raises ConfigError."""
    _check_tools(missing)
    progress(f"llumd: {_count(missing)}; compiling them: minutes, once (--no-build refuses to start instead)")
    try:
        for arch, specs in missing.items():
            kernel_compiler.build(specs, arch, kernels.directory(arch), progress)
    except KernelError as e:
        raise ConfigError(f"the kernels could not be compiled: {e}") from None


def _check_tools(missing: Missing) -> None:
    try:
        tools = toolkit.toolchain()
        for arch in missing:
            toolkit.check_arch(tools, arch)
    except KernelError as e:
        raise ConfigError(f"{_count(missing)}, and cannot be compiled: {e}") from None


def _count(missing: Missing) -> str:
    where = " and ".join(f"{len(specs)} compiled kernels for {arch}" for arch, specs in missing.items())
    return f"{where} are not in {kernels.kernels_dir()}"


def _required(config: Config, model_config: ModelConfig, arch: str) -> list[KernelSpec]:
    try:
        return kernels.required(model_config, arch=arch, kv_dtype=cast(KvDtype, config.kv_dtype))
    except KernelError as e:
        raise ConfigError(str(e)) from None


def _build_command(config: Config) -> str:
    model = "" if config.model == "demo" else " " + shlex.quote(config.model)
    return f"{command('llumd')} kernels build{model}" + (" --kv-dtype fp8" if config.kv_dtype == "fp8" else "")
