"""Detection of devices, and the checks before an engine starts on a GPU."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.cli import devices, llumd, prepare
from daemon.config import Config, ConfigError
from daemon.engine.cuda import kernels
from daemon.ipc.child import EXIT_CONFIG
from daemon.models.model_config import ModelConfig, read_model_config
from tests.models.tiny_model import make_tiny_llama

Machine = Callable[..., None]


@pytest.fixture
def model_config(tmp_path: Path) -> ModelConfig:
    return read_model_config(make_tiny_llama(tmp_path / "tiny", head_dim=64, weights=False))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Simulate a machine: GPUs of these compute capabilities, a PyTorch build for `cuda`, and no kernels.

    `shown` is the value of $CUDA_VISIBLE_DEVICES.
    """

    def make(*capabilities: str, shown: str | None = None, cuda: str | None = "13.0") -> None:
        tools, torch = tmp_path / "tools", tmp_path / "site" / "torch"
        tools.mkdir()
        torch.mkdir(parents=True)
        lines = "".join(f"{c}\\n" for c in capabilities)
        (tools / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{lines}'\n")
        (tools / "nvidia-smi").chmod(0o755)
        (torch / "__init__.py").write_text("raise RuntimeError('checks must not import torch')")
        (torch / "version.py").write_text(f"__version__ = '2.11.0'\ncuda: Optional[str] = {cuda!r}\nhip = '6.2'\n")
        monkeypatch.setenv("PATH", str(tools))
        monkeypatch.setenv("LLUMD_KERNELS", str(tmp_path / "kernels"))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if shown is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
        spec = importlib.util.spec_from_file_location("torch", torch / "__init__.py")
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)

    return make


def default_devices(config: Config) -> tuple[list[str], list[str]]:
    """Return the default devices and the progress messages."""
    messages: list[str] = []
    return devices.default_devices(config, messages.append), messages


# -- the default -------------------------------------------------------------------------------


def test_every_gpu_gets_an_engine(machine: Machine):
    machine("9.0", "9.0", "9.0")
    assert default_devices(Config()) == (["cuda:0", "cuda:1", "cuda:2"], [])


def test_without_gpus_two_engines_share_the_cpu(machine: Machine):
    machine()
    assert default_devices(Config()) == (["cpu", "cpu"], [])


def test_engines_without_a_model_need_no_gpu(machine: Machine):
    machine("9.0")
    assert default_devices(Config(engine="stub")) == (["cpu", "cpu"], [])


def test_the_reason_for_an_unusable_gpu_is_printed(machine: Machine):
    machine("6.1")
    names, messages = default_devices(Config())
    assert names == ["cpu", "cpu"]
    assert "6.1" in messages[0] and "serving on the CPU" in messages[0]


@pytest.mark.parametrize(
    ("installed", "shown", "number"),
    [
        (4, None, 4), (4, "", 0), (4, "-1", 0), (4, "2", 1), (4, "0, 3", 2), (4, "0,7,1", 1), (4, "1,-1,2", 1),
        (2, "GPU-8f2c,MIG-11", 2), (4, "NoDevFiles", 0), (0, "0", 0), (0, None, 0),
    ],
)  # fmt: skip
def test_visible_devices_are_counted_as_in_cuda(installed: int, shown: str | None, number: int):
    assert devices.count_visible(installed, shown) == number


@given(st.integers(0, 16), st.lists(st.integers(-2, 20), max_size=8))
def test_at_most_the_listed_devices_are_visible(installed: int, named: list[int]):
    count = devices.count_visible(installed, ",".join(map(str, named)))
    assert count <= len(named)
    assert all(0 <= n < installed for n in named[:count])


def test_without_nvidia_smi_the_driver_gives_the_number(machine: Machine, tmp_path: Path):
    machine(shown="1")
    (tmp_path / "gpus" / "0000:1b:00.0").mkdir(parents=True)
    (tmp_path / "gpus" / "0000:1c:00.0").mkdir()
    assert devices.detect_gpus(tmp_path / "gpus") == devices.Gpus(1, "")


def test_different_gpus_have_no_common_architecture(machine: Machine):
    machine("9.0", "8.9")
    assert devices.detect_gpus() == devices.Gpus(2, "")


# -- errors ------------------------------------------------------------------------------------


def error_message(config: Config, model_config: ModelConfig) -> str:
    with pytest.raises(ConfigError) as error:
        devices.check_gpus(config, model_config)
    return str(error.value)


def test_no_gpu_is_visible(machine: Machine, model_config: ModelConfig):
    machine()
    message = error_message(Config(devices=["cuda:0"]), model_config)
    assert (
        message.startswith("devices: there is no cuda:0: no NVIDIA GPU is visible") and "--devices cpu,cpu" in message
    )


def test_a_gpu_number_that_is_too_high(machine: Machine, model_config: ModelConfig):
    machine("9.0", "9.0", shown="1")
    message = error_message(Config(devices=["cuda:0", "cuda:1"]), model_config)
    assert (
        "no cuda:1: the visible GPUs have the numbers 0 to 0" in message and "CUDA_VISIBLE_DEVICES is '1'" in message
    )


def test_a_pytorch_build_for_the_cpu(machine: Machine, model_config: ModelConfig):
    machine("9.0", cuda=None)
    assert "LLUMD_TORCH=cuda bin/serve" in error_message(Config(devices=["cuda:0"]), model_config)


def test_flashinfer_is_not_installed(machine: Machine, model_config: ModelConfig, monkeypatch: pytest.MonkeyPatch):
    def not_installed(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    machine("9.0", "8.9")
    monkeypatch.setattr(importlib.metadata, "version", not_installed)
    assert "flashinfer-python is not installed" in error_message(Config(devices=["cuda:0"]), model_config)


def test_the_error_for_missing_kernels_has_the_command_that_builds_them(machine: Machine, model_config: ModelConfig):
    pytest.importorskip("flashinfer", reason="the extra `cuda` is not installed")
    machine("9.0")
    message = error_message(Config(model="my models/a", devices=["cuda:0"], kv_dtype="fp8"), model_config)
    assert "e4m3" in message and "rotary" in message
    assert "llumd kernels build 'my models/a' --kv-dtype fp8 --arch 9.0a" in message


def test_a_complete_machine_passes_the_checks(machine: Machine, model_config: ModelConfig):
    pytest.importorskip("flashinfer", reason="the extra `cuda` is not installed")
    machine("9.0")
    for spec in kernels.required(model_config, arch="9.0a"):
        folder = kernels.directory("9.0a") / spec.name
        folder.mkdir(parents=True)
        (folder / f"{spec.name}.so").write_bytes(b"library")
        (folder / kernels.RECORD).write_text(json.dumps({"size": 7, "nvcc": "13.0", "tvm_ffi": "0.1.6"}))
    devices.check_gpus(Config(devices=["cuda:0", "cuda:0"]), model_config)


def test_check_fails_with_the_exit_code_for_settings(machine: Machine, model_config: ModelConfig, capsys):
    machine("9.0", cuda=None)
    with pytest.raises(SystemExit) as done:
        llumd.main(["check", str(model_config.path), "--load-format", "dummy"])  # `devices` is empty
    assert done.value.code == EXIT_CONFIG
    assert "LLUMD_TORCH=cuda" in capsys.readouterr().err


def test_prepare_applies_the_defaults_for_gpus(
    machine: Machine, model_config: ModelConfig, monkeypatch: pytest.MonkeyPatch
):
    machine("9.0", "9.0")
    monkeypatch.setattr(devices, "check_gpus", lambda config, model_config: None)
    config = Config(model=str(model_config.path), load_format="dummy").replace({"max_num_seqs": 9}, "test")
    config = prepare.prepare(config, print).config
    assert config.devices == ["cuda:0", "cuda:1"]
    assert (config.max_num_seqs, config.max_batch_tokens, config.itl_target) == (9, 8192, 0.05)


@pytest.mark.parametrize(
    ("text", "cuda"),
    [
        ("cuda: Optional[str] = None\n", None),
        ("cuda: Optional[str] = '13.0'\nhip = None", "13.0"),
        ('cuda = "12.8"', "12.8"),
        ("__version__ = '2.11.0+cu130'\n", None),
    ],
)
def test_the_cuda_version_of_a_pytorch_build(tmp_path: Path, text: str, cuda: str | None):
    (tmp_path / "version.py").write_text(text)
    assert devices.torch_cuda(tmp_path / "version.py") == cuda


def test_the_cuda_version_of_the_installed_pytorch():
    import torch.version

    assert devices.torch_cuda(Path(torch.version.__file__)) == torch.version.cuda
