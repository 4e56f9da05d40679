"""Which runner an engine gets. Heavy imports happen here, inside the engine's process, and nowhere earlier."""

from __future__ import annotations

import os

from daemon.config import Config
from daemon.engine.runner import DeviceRunner, Runner
from daemon.models.model_config import ModelConfig


def build_runner(config: Config, model_config: ModelConfig, device: str = "cpu") -> Runner:
    """The runner that `config.engine` asks for, on that device. Raises ModelError for a model that cannot run here.

    One on a GPU is a `DeviceRunner`.
    """
    length = min(config.max_model_len or model_config.max_position, model_config.max_position)
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
    if config.on_gpus:
        return _build_cuda(config, model_config, device, length)
    from daemon.engine.cpu.runner import CpuRunner

    return CpuRunner(
        model_config,
        threads=config.threads or max(1, cores() // max(1, len(config.devices))),
        dtype=config.dtype,
        deterministic=config.deterministic,
        load_format=config.load_format,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_batch_tokens=config.max_batch_tokens,
        max_model_len=length,
    )


def _build_cuda(config: Config, model_config: ModelConfig, device: str, length: int) -> DeviceRunner:
    from daemon.engine.cuda import numa
    from daemon.engine.cuda.runner import CudaRunner
    from daemon.kvpool.cudart import CudaRuntime

    sharing = config.devices.count(device)
    runner = CudaRunner(
        model_config,
        device=device,
        dtype=config.dtype,
        kv_dtype=config.kv_dtype,
        deterministic=config.deterministic,
        load_format=config.load_format,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_batch_tokens=config.max_batch_tokens,
        max_model_len=length,
        kv_memory=config.kv_memory,
        memory_share=config.memory_share / sharing,
    )
    if sharing > 1:
        runner.device += f", shared by {sharing}"  # its steps take as long as those of the others leave it
    numa.stay_near(CudaRuntime().pci_address(int(device.removeprefix("cuda:"))))  # before memory is taken
    return runner


def cores() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0))
