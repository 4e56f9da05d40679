"""Build the runner of an engine. The engine's process imports heavy packages here, not earlier."""

from __future__ import annotations

from pathlib import Path

from daemon.config import Config, ConfigError
from daemon.engine.runner import DeviceRunner, Runner, RunnerSettings, Unavailable
from daemon.machine import cpus
from daemon.models.model_config import ModelConfig


def build_runner(config: Config, model_config: ModelConfig, device: str = "cpu") -> Runner:
    """Build the runner that `config.engine` names, on `device`. On a GPU it is a `DeviceRunner`.

    Raises ModelError for a model that cannot run here, Unavailable for a script that cannot be read.
    """
    length = config.max_model_len or model_config.max_position  # checked before the start
    if config.engine == "stub":
        from daemon.engine.fake.stub import StubRunner

        return StubRunner(
            step_seconds=config.stub_step,
            vocab_size=model_config.vocab_size,
            max_model_len=length,
            block_size=config.block_size,
        )
    if config.engine == "hash":
        from daemon.engine.fake.hash import HashRunner

        return HashRunner(model_config.vocab_size, length, config.block_size, step_seconds=config.stub_step)
    if config.engine == "script":
        return _build_script(config, model_config, length)
    settings = _settings(config, length, device)
    if config.on_gpus:
        return _build_cuda(model_config, settings, device, sharing=config.devices.count(device))
    from daemon.engine.cpu.runner import CpuRunner

    return CpuRunner(model_config, settings)


def _build_script(config: Config, model_config: ModelConfig, max_model_len: int) -> Runner:
    from daemon.engine.fake.script import ScriptRunner, read_script
    from daemon.models.tokenizer import Tokenizer

    try:
        script = read_script(Path(config.script))
    except ConfigError as e:  # it was good before the start
        raise Unavailable(str(e)) from None
    return ScriptRunner(
        script,
        Tokenizer(model_config.path),
        model_config.eos_token_ids,
        step_seconds=config.stub_step,
        vocab_size=model_config.vocab_size,
        max_model_len=max_model_len,
        block_size=config.block_size,
    )


def _settings(config: Config, max_model_len: int, device: str) -> RunnerSettings:
    return RunnerSettings(
        load_format=config.load_format,
        dtype=config.dtype,
        kv_dtype=config.kv_dtype,
        deterministic=config.deterministic,
        threads=config.threads or max(1, cpus() // max(1, len(config.devices))),
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_batch_tokens=config.max_batch_tokens,
        max_model_len=max_model_len,
        kv_memory=config.kv_memory,
        memory_share=config.memory_share / max(1, config.devices.count(device)),
    )


def _build_cuda(model_config: ModelConfig, settings: RunnerSettings, device: str, *, sharing: int) -> DeviceRunner:
    from daemon.engine.cuda import numa
    from daemon.engine.cuda.runner import CudaRunner
    from daemon.kvpool.cudart import CudaRuntime

    runner = CudaRunner(model_config, settings, device=device)
    if sharing > 1:
        runner.device += f", shared by {sharing}"  # the other engines on the device slow its steps
    numa.stay_near(CudaRuntime().pci_address(int(device.removeprefix("cuda:"))))  # before memory is allocated
    return runner
